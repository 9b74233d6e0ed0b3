"""Names of a checkpoint's tensors, and the storage formats that they reveal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable

from prodial_kernels._checks import some_of

OFFSET = "prodial_offset_"
"""Begins the name of a parameter that holds how far another of its module has moved."""
ADDED = "prodial_added_"
"""Begins the name of a parameter that a method of fine-tuning has added to a module."""
METHOD = "prodial"
"""What transformers calls this package's way of quantising."""
_SHOWN = 6
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_OF_ADAPTER = re.compile(
    r"(.+)\.(?:prodial_[a-z_]+|prodial_[A-Za-z]\.[\w-]+\.weight|base_layer\..+)"
)
_MOVED = re.compile(rf"(.+\.)(?:base_layer\.)?{OFFSET}(\w+)")

SIGNS = {"weight.quant_state.bitsandbytes__nf4": "nf4", "SCB": "int8",
         "weight_scale_rows": "int8", "weight_scale_inv": "fp8",
         "weight_group_scales": "groups"}  # fmt: skip
"""The entry of a state dict by which a layer in a format is recognised."""

_BY_LOADING = "without a quantization_config that says so (prodial and load_model read it with one)"
# Entries that other libraries write beside a weight, which can then not be read as dense.
_OTHERS = {
    "weight.quant_state.bitsandbytes__fp4": "bitsandbytes' FP4; the 4-bit format read is nf4",
    # Read where a quantization_config says of which bits and version they are.
    "qweight": f"GPTQ or AWQ {_BY_LOADING}",
    "qzeros": f"GPTQ or AWQ {_BY_LOADING}",
    "g_idx": f"GPTQ {_BY_LOADING}",
    "weight_packed": f"compressed-tensors {_BY_LOADING}",
    "weight_scale": "compressed-tensors, modelopt or fbgemm",
    "weight_zero_point": "compressed-tensors",
    "input_scale": "compressed-tensors or modelopt",
    "weight_qdata": "torchao",
    "weight_scales": "EETQ or quanto",
    "W_q": "HQQ",
    "weight._data": "quanto",
    "weight._scale": "quanto",
    "codebooks": "AQLM",
    "_blocks": "MXFP4",
    "_scales": "MXFP4",
    "_scale_inv": "fp8 experts, several in one tensor",
    "_qdata": "torchao",
    ":qdata": "torchao",
}
_NARROW = {
    "I8": "int8", "U8": "uint8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F4": "float4_e2m1fn_x2",
}  # fmt: skip


def listed(names: Iterable[str]) -> str:
    """Return ``names`` for a message: all of a few, else those of several layers as one."""
    ordered = sorted(names, key=lambda name: ([int(n) for n in _NUMBER.findall(name)], name))
    if len(ordered) > _SHOWN:
        folded = Counter(_NUMBER.sub("*", name) for name in ordered)
        ordered = [f"{name} (×{n})" if n > 1 else name for name, n in folded.items()]
    return some_of(ordered, _SHOWN)


def is_part_of_adapter(name: str, weights: Collection[str]) -> bool:
    """Whether ``name`` is of an adapter whose merged weight is among ``weights`` as well.

    ``save_pretrained`` of an adapted model writes both: the merged weight for everyone, and the
    parts for a trainer that resumes.
    """
    moved = _MOVED.fullmatch(name)
    if moved is not None:
        return "".join(moved.groups()) in weights
    part = _OF_ADAPTER.fullmatch(name)
    return part is not None and f"{part.group(1)}.weight" in weights


def is_part(name: str) -> bool:
    """Whether ``name`` has the form of an adapted layer's tensor."""
    return _OF_ADAPTER.fullmatch(name) is not None or _MOVED.fullmatch(name) is not None


def foreign_format(name: str) -> str | None:
    """Return whose unsupported storage format ``name`` is an entry of, or None."""
    if name.rpartition(".")[2] in SIGNS:
        return None
    for entry, whose in _OTHERS.items():
        if name.endswith(entry if entry[0] in "_:" else f".{entry}"):
            return whose
    return None


def check_dense_dtype(name: str, dtype: str) -> None:
    """Raise ValueError if a dense tensor's dtype, named by safetensors or PyTorch, is of codes."""
    called = _NARROW.get(dtype, dtype)
    # A bias of 8 bits is a mask, which old checkpoints hold.
    if called in _NARROW.values() and not name.endswith("bias"):
        whose = foreign_format(name)
        raise ValueError(
            f"{name} is stored as {called}: "
            + (
                f"a format that is not read ({whose}). Use the dense checkpoint"
                if whose is not None
                else "codes of a quantised weight, without the scales of a format that is read "
                f"({', '.join(SIGNS)} beside it). Use the dense checkpoint, or fetch this one again"
            )
        )


def is_one_of(value: object, allowed: tuple[object, ...]) -> bool:
    """Whether ``value`` is among ``allowed`` and of its type: neither 64.0 nor True is a size."""
    return any(type(value) is type(other) and value == other for other in allowed)
