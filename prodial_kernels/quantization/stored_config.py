"""Checking that every field of a checkpoint's ``quantization_config`` is supported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prodial_kernels.quantization.names import METHOD, is_one_of

# Field -> the values that are read; None for a field that has no meaning for stored tensors, or one
# that is read from them.
_FIELDS: dict[str, dict[str, tuple[Any, ...] | None]] = {
    "bitsandbytes": {
        "_load_in_4bit": None, "_load_in_8bit": None, "load_in_4bit": None, "load_in_8bit": None,
        "bnb_4bit_compute_dtype": None, "bnb_4bit_quant_storage": None,
        "bnb_4bit_quant_type": ("nf4",), "bnb_4bit_use_double_quant": None,
        "llm_int8_enable_fp32_cpu_offload": None, "llm_int8_has_fp16_weight": (False,),
        "llm_int8_skip_modules": None, "llm_int8_threshold": None,
    },
    METHOD: {"format": ("nf4", "int8", "fp8"), "target_modules": None},
    "fp8": {
        "activation_scheme": ("dynamic",), "dequantize": None, "fmt": ("e4m3",),
        "modules_to_not_convert": None, "scale_fmt": ("float", "ue8m0", None),
        "weight_block_size": ([128, 128], (128, 128)),
    },
}  # fmt: skip

# The same where all other fields say how the weights were found, which their layout does not show.
_LAYOUTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "gptq": {
        "bits": (2, 3, 4, 8), "pack_dtype": ("int32", None), "method": ("gptq", None),
        "checkpoint_format": ("gptq", "gptq_v2", None), "format": ("gptq", "gptq_v2", None),
        "is_marlin_format": (False, None), "adapter": (None, {}),
    },
    "awq": {
        # Without zero points of their own, gptqmodel stores the middle as that of every group.
        "bits": (4,), "w_bit": (4,), "zero_point": (True, False), "version": ("gemm", "GEMM", None),
        "pack_dtype": ("int32", None), "method": ("awq", None), "adapter": (None, {}),
        "checkpoint_format": ("gemm", "GEMM", None), "format": ("gemm", "GEMM", None),
    },
}  # fmt: skip

WHOLE_SCALES = ("modelopt", "compressed-tensors")
"""Methods whose FP8 layers have one scale, or one for each row."""
_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "num_bits": (8,), "type": ("float",), "strategy": ("tensor", "channel", None),
    "symmetric": (True, None), "group_size": (None,), "block_structure": (None,),
}  # fmt: skip
_INTEGERS: dict[str, tuple[Any, ...]] = {
    "num_bits": (2, 3, 4, 5, 6, 7, 8), "type": ("int",), "strategy": ("group", "channel", "tensor"),
    "actorder": (None, "weight", "static", False), "block_structure": (None,),
}  # fmt: skip
_INTEGER = {**_WEIGHTS, "type": ("int",)}
_MIXED, _PACKED, _INT8 = "mixed-precision", "pack-quantized", "int-quantized"
_FLOAT8 = ("float-quantized", "naive-quantized")


def _check_whole_scales(method: str, config: Mapping[str, Any]) -> None:
    """The same of :data:`WHOLE_SCALES`; how inputs are rounded does not matter for weights."""
    groups = config.get("config_groups")
    found: list[tuple[str, Any, tuple[Any, ...]]] = []
    whole = config.get("format")
    if method == "modelopt":
        found.append(("quant_algo", config.get("quant_algo"), ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")))
    else:
        found.append(("format", whole, (*_FLOAT8, _PACKED, _INT8, _MIXED)))
        for name in ("sparsity_config", "transform_config"):
            found.append((name, config.get(name) or None, (None,)))
        groups = groups or {"": {}}
    for group in (groups or {}).values():
        weights = group.get("weights") or {}
        form = group.get("format") or whole
        if whole == _MIXED:
            found.append(("format of a group", form, (*_FLOAT8, _PACKED, _INT8)))
        for name, read in {_PACKED: _INTEGERS, _INT8: _INTEGER}.get(str(form), _WEIGHTS).items():
            # ModelOpt leaves out what is as usual.
            if name in weights or (method != "modelopt" and name in ("num_bits", "type")):
                found.append((f"weights.{name}", weights.get(name), read))
    for name, value, read in found:
        if not is_one_of(value, read):
            raise ValueError(
                f"its quantization_config says {name}={value!r} ({method}), which is not read "
                "here: what is read of it is FP8 with a scale for a weight or a row"
                + ("" if method == "modelopt" else ", int8 likewise, integers in pack-quantized")
                + ". Use the dense checkpoint, with --quantize where it is too large"
            )


def check_stored_config(config: Mapping[str, Any]) -> None:
    """Raise ValueError unless a ``quantization_config`` of a checkpoint is read, field by field."""
    method = getattr(config.get("quant_method"), "value", config.get("quant_method"))
    if method is None and ({"load_in_4bit", "load_in_8bit"} & config.keys()):
        # As transformers takes it.
        method = "bitsandbytes"
    if method in WHOLE_SCALES:
        _check_whole_scales(str(method), config)
        return
    layout = _LAYOUTS.get(str(method))
    if layout is not None:
        for name in layout.keys() & ({"bits", *config} if method == "gptq" else config.keys()):
            if not is_one_of(config.get(name), layout[name]):
                raise ValueError(
                    f"its quantization_config says {name}={config.get(name)!r} ({method}), which "
                    "is not read here. Use the dense checkpoint, with --quantize where it is too "
                    "large"
                )
        return
    fields = _FIELDS.get(str(method))
    if fields is None:
        raise ValueError(
            f"it is quantised with {method!r}, whose format is not read here; these are: "
            f"bitsandbytes (nf4, int8), gptq, awq (gemm), fp8 with 128×128 blocks, fp8 with a "
            f"scale for a weight or row ({', '.join(WHOLE_SCALES)}), integers of the latter, and "
            f"{METHOD}. Use the dense checkpoint, with --quantize where it is too large"
        )
    # With 8 bits, the other fields have defaults that mean nothing.
    four_bits = bool(config.get("load_in_4bit", config.get("_load_in_4bit")))
    for name, value in config.items():
        if name == "quant_method" or (name.startswith("bnb_4bit_") and not four_bits):
            continue
        read = fields.get(name, ())
        if read is not None and not is_one_of(value, read):
            raise ValueError(
                f"its quantization_config says {name}={value!r} ({method}), which is not read "
                "here. Use the dense checkpoint, with --quantize where it is too large"
            )
