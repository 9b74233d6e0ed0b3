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

WHOLE_SCALES = ("modelopt", "compressed-tensors")
"""Methods whose FP8 layers have one scale, or one for each row."""
_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "num_bits": (8,), "type": ("float",), "strategy": ("tensor", "channel", None),
    "symmetric": (True, None), "group_size": (None,), "block_structure": (None,),
}  # fmt: skip


def _check_whole_scales(method: str, config: Mapping[str, Any]) -> None:
    """The same of :data:`WHOLE_SCALES`; how inputs are rounded does not matter for weights."""
    groups = config.get("config_groups")
    found: dict[str, Any] = {}
    if method == "modelopt":
        found["quant_algo"] = (config.get("quant_algo"), ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"))
    else:
        found["format"] = (config.get("format"), ("float-quantized", "naive-quantized"))
        for name in ("sparsity_config", "transform_config"):
            found[name] = (config.get(name) or None, (None,))
        groups = groups or {"": {}}
    for group in (groups or {}).values():
        weights = group.get("weights") or {}
        for name, read in _WEIGHTS.items():
            # ModelOpt leaves out what is as usual.
            if name in weights or (method != "modelopt" and name in ("num_bits", "type")):
                found[f"weights.{name}"] = (weights.get(name), read)
    for name, (value, read) in found.items():
        if not is_one_of(value, read):
            raise ValueError(
                f"its quantization_config says {name}={value!r} ({method}), which is not read "
                "here: what is read of it is FP8 with a scale for a weight or a row. Use the dense "
                "checkpoint, with --quantize where it is too large"
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
    fields = _FIELDS.get(str(method))
    if fields is None:
        raise ValueError(
            f"it is quantised with {method!r}, whose format is not read here; these are: "
            f"bitsandbytes (nf4, int8), fp8 with 128×128 blocks, fp8 with a scale for a weight "
            f"or row ({', '.join(WHOLE_SCALES)}), and {METHOD}. Use the dense checkpoint, with "
            "--quantize where it is too large"
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
