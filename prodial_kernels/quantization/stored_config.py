"""Checking that every field of a checkpoint's ``quantization_config`` is supported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_Check = Callable[[Any], bool]


def _any(value: Any) -> bool:
    return True


def _is(*allowed: Any) -> _Check:
    return lambda value: any(value == a and type(value) is type(a) for a in allowed)


# Field -> whether a value is one whose meaning is read from the tensors, or has none for them.
_FIELDS: dict[str, dict[str, _Check]] = {
    "bitsandbytes": {
        "_load_in_4bit": _any,
        "_load_in_8bit": _any,
        "load_in_4bit": _any,
        "load_in_8bit": _any,
        "bnb_4bit_compute_dtype": _any,
        "bnb_4bit_quant_storage": _any,
        "bnb_4bit_quant_type": _is("nf4"),
        "bnb_4bit_use_double_quant": _any,
        "llm_int8_enable_fp32_cpu_offload": _any,
        "llm_int8_has_fp16_weight": _is(False),
        "llm_int8_skip_modules": _any,
        "llm_int8_threshold": _any,
    },
    "fp8": {
        "activation_scheme": _is("dynamic"),
        "dequantize": _any,
        "fmt": _is("e4m3"),
        "modules_to_not_convert": _any,
        "scale_fmt": _is("float", "ue8m0", None),
        "weight_block_size": _is([128, 128], (128, 128)),
    },
}


def check_stored_config(config: Mapping[str, Any]) -> None:
    """Raise unless a checkpoint's ``quantization_config`` is understood, field by field.

    Raises:
        ValueError: Another library's format, or a field that says what is not read here.
    """
    method = getattr(config.get("quant_method"), "value", config.get("quant_method"))
    if method is None and ({"load_in_4bit", "load_in_8bit"} & config.keys()):
        # As transformers takes it.
        method = "bitsandbytes"
    fields = _FIELDS.get(str(method))
    if fields is None:
        raise ValueError(
            f"it is quantised with {method!r}, whose format is not read here; these are: "
            "bitsandbytes (nf4, int8) and fp8 with 128×128 blocks. Use the dense checkpoint, with "
            "--quantize where it is too large"
        )
    # With 8 bits, the other fields have defaults that mean nothing.
    four_bits = bool(config.get("load_in_4bit", config.get("_load_in_4bit")))
    for name, value in config.items():
        if name == "quant_method" or (name.startswith("bnb_4bit_") and not four_bits):
            continue
        check = fields.get(name)
        if check is None or not check(value):
            raise ValueError(
                f"its quantization_config says {name}={value!r} ({method}), which is not read "
                "here. Use the dense checkpoint, with --quantize where it is too large"
            )
