"""Making a quantised layer from a dense one or from a checkpoint's entries, and its error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prodial_kernels._checks import check_choice
from prodial_kernels.quantization.fp8 import FP8Linear
from prodial_kernels.quantization.groups.layer import GroupedLinear
from prodial_kernels.quantization.int8 import Int8Linear, row_chunks
from prodial_kernels.quantization.layer import QuantizedLinear
from prodial_kernels.quantization.names import SIGNS, foreign_format
from prodial_kernels.quantization.nf4 import NF4Linear

_CLASSES: dict[str, type[QuantizedLinear]] = {
    cls.FORMAT: cls for cls in (NF4Linear, Int8Linear, FP8Linear)
}
FORMATS = tuple(_CLASSES)
STORED = "stored"
"""In the place of a format: the one that a layer is stored in, in the same groups and dtypes."""
# What is read and not made: the layouts of other libraries are repacked into it.
_READ: dict[str, type[QuantizedLinear]] = {**_CLASSES, GroupedLinear.FORMAT: GroupedLinear}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class QuantizationError:
    """The error of a quantised weight.

    Attributes:
        maximum: Largest |quantised − dense|.
        relative_rms: Root mean square of the difference over that of the dense weight.
    """

    maximum: float
    relative_rms: float

    def __str__(self) -> str:
        return f"max {self.maximum:.3e}, relative rms {self.relative_rms:.3e}"


def quantize_linear(linear: nn.Linear, format: str) -> QuantizedLinear:
    """Return a frozen layer with the weight of ``linear`` in ``format``, on its device.

    The bias is taken over as it is; ``linear`` itself is not changed. Round-to-nearest, no
    calibration data: the quantisers of the libraries whose formats these are.

    Args:
        linear: A dense layer with a float32, bfloat16 or float16 weight.
        format: ``"nf4"`` (with double quantisation), ``"int8"`` or ``"fp8"``.

    Raises:
        TypeError: ``linear`` is not a dense ``nn.Linear`` in one of those dtypes.
        ValueError: An unknown format, an empty or meta weight, or one that is not finite.
    """
    check_choice("format", format, FORMATS)
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
    weight = linear.weight.detach()
    if type(linear.weight) is not nn.Parameter or weight.dtype not in _DTYPES:
        raise TypeError(
            f"linear must have a dense weight in float32, bfloat16 or float16, got a "
            f"{type(linear.weight).__name__} of {weight.dtype}; dequantise or cast it first"
        )
    if weight.is_meta or not weight.numel():
        raise ValueError(
            f"linear has no values to quantise (weight {list(weight.shape)} on {weight.device}); "
            "load its weight first"
        )
    # By parts: of a head's weight at once, what this takes beside it would be twice its bytes.
    if not all(weight[rows].isfinite().all() for rows in row_chunks(weight)):
        raise ValueError(
            "linear has a weight that is not finite, whose scales would be NaN; load it again"
        )
    return _CLASSES[format].quantize(weight, linear.bias).train(linear.training)


def from_state_dict(
    state: Mapping[str, Tensor], prefix: str = "", *, dtype: torch.dtype | None = None
) -> QuantizedLinear:
    """Return the quantised layer that ``state`` holds under ``prefix``, whatever its format.

    One layer's entries are enough, so that a checkpoint can be read a layer at a time. The
    tensors are taken as they are, not copied.

    Args:
        state: A state dict as bitsandbytes, DeepSeek or this package writes it.
        prefix: Dotted path of the layer, with the dot.
        dtype: What to compute in; default: what the format says, see its ``from_entries``.

    Raises:
        KeyError: An entry of the format is missing.
        ValueError: No known format under ``prefix``, or entries that do not fit it.
    """
    entries = {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }
    format = next((SIGNS[name] for name in entries if name in SIGNS), None)
    if format is None:
        for name in entries:
            if (whose := foreign_format(f".{name}")) is not None:
                raise ValueError(f"{prefix}{name} is of a format that is not read: {whose}")
        raise ValueError(
            f"no quantised weight under prefix {prefix!r}: expected one of {', '.join(SIGNS)} "
            f"beside weight, found {', '.join(sorted(entries)[:8]) or 'nothing'}"
        )
    return _READ[format].from_entries(entries, entries.get("bias"), dtype)


@torch.no_grad()
def quantization_error(dense: Tensor, quantized: QuantizedLinear) -> QuantizationError:
    """Compare ``quantized`` with the weight [out_features, in_features] it was made from."""
    exact = dense.float()
    difference = quantized.dequantize(dtype=torch.float32).sub_(exact)
    scale = float(exact.square().mean().sqrt())
    rms = float(difference.square().mean().sqrt())
    return QuantizationError(
        maximum=float(difference.abs().max()),
        relative_rms=rms / scale if scale else 0.0,
    )
