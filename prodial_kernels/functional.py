"""``prodial_linear``: validate, choose an implementation, dispatch. Everything calls this."""

from __future__ import annotations

import torch
from torch import Tensor

from prodial_kernels._checks import DIAGONALS, check_choice, check_dropout, check_finite
from prodial_kernels._validation import check_frozen, check_operands, check_triton
from prodial_kernels.ops.autocast import autocast_dtype, autocast_off
from prodial_kernels.ops.implementation import resolve_impl
from prodial_kernels.ops.layout import direct_length, unit_stride_rows
from prodial_kernels.ops.portable import TorchProdialLinear
from prodial_kernels.ops.reference import reference_linear, scale_deviation_of
from prodial_kernels.ops.triton_autograd import TritonProdialLinear


def prodial_linear(
    x: Tensor,
    weight: Tensor,
    *,
    blocks: Tensor | None = None,
    scale: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    bias: Tensor | None = None,
    lora_scaling: float = 1.0,
    lora_dropout: float = 0.0,
    training: bool = False,
    diagonal: str = "relu",
    impl: str = "auto",
    channel_first: bool = False,
) -> Tensor:
    """Apply a frozen linear layer with a ProDiaL adapter, without forming the adapted weight.

    ``Y = s ⊙ ((X D_bᵀ) Wᵀ) + α dropout(X) Aᵀ Bᵀ + bias``, that is ``X W'ᵀ + bias`` with
    ``W' = s ⊙ (W D_b) + α B A`` (Eq. 7 of the ProDiaL paper). Any of the adapter's parts may be
    None, which gives the paper's ablations; only ``lora_a`` and ``lora_b`` is plain LoRA.

    Under autocast, ``x``, ``weight`` and ``bias`` are cast to the autocast dtype as by
    ``F.linear``; the adapter keeps its own dtype (fp32 masters are advised).

    Args:
        x: Input, [..., in_features].
        weight: Frozen weight W, [out_features, in_features].
        blocks: The paper's D_a, [n_blocks, P, P] with n_blocks · P = in_features.
        scale: Output scale s, [out_features].
        lora_a: A, [r, in_features].
        lora_b: B, [out_features, r].
        bias: [out_features].
        lora_scaling: α, PEFT's ``lora_alpha / r``.
        lora_dropout: Dropout probability on the input of the LoRA branch only.
        training: Whether dropout is active.
        diagonal: ``"relu"`` for Eq. 7 (diagonal of D_b ≤ 1; subgradient 1 at 0) or ``"free"`` for
            D_b = I + D_a.
        impl: ``"reference"`` (plain autograd, the definition), ``"torch"`` (hand-written backward,
            any device), ``"triton"`` (fused kernels) or ``"auto"`` (see
            :func:`prodial_kernels.resolve_impl`).
        channel_first: Return [..., out_features, l] for x [..., l, in_features], contiguous: the
            layout that Mamba-1's convolution and scan take.

    Returns:
        [..., out_features], dtype of ``x`` (of autocast where it is on).

    Raises:
        TypeError: A dtype that cannot be used, or an option of the wrong kind.
        ValueError: A shape, device or choice that does not fit, a ``lora_scaling`` that is not
            finite, or a ``weight`` that requires a gradient (only ``impl="reference"`` gives one).
    """
    deviation = None
    if scale is not None:
        if not scale.is_floating_point():
            raise TypeError(f"scale must have a floating-point dtype, got {scale.dtype}")
        deviation = scale_deviation_of(scale)
    return adapted_linear(
        x, weight, blocks=blocks, scale_deviation=deviation, lora_a=lora_a, lora_b=lora_b,
        bias=bias, lora_scaling=lora_scaling, lora_dropout=lora_dropout,
        training=training, diagonal=diagonal, impl=impl, channel_first=channel_first,
    )  # fmt: skip


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    *,
    blocks: Tensor | None,
    scale_deviation: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    lora_scaling: float,
    lora_dropout: float,
    training: bool,
    diagonal: str,
    impl: str,
    channel_first: bool = False,
) -> Tensor:
    """:func:`prodial_linear` of an adapter as a layer keeps it: with s − 1 in the place of s.

    ``scale_deviation`` is s − 1, [out_features]: zero where nothing is trained, as ``blocks``,
    which holds D_a and not D_b, is. The rest is as there.
    """
    check_choice("diagonal", diagonal, DIAGONALS)
    check_dropout(lora_dropout)
    if not torch.compiler.is_compiling():
        check_finite("lora_scaling", lora_scaling)
    dtype = autocast_dtype(x)
    check_operands(
        x, weight, blocks, scale_deviation, lora_a, lora_b, bias, autocast=dtype is not None
    )  # fmt: skip
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)

    chosen = resolve_impl(impl, x)
    drop = training and lora_dropout > 0.0 and lora_a is not None
    with autocast_off(x.device.type):
        if chosen == "triton":
            if impl == "triton":
                check_triton(x)
            check_frozen(weight)
            y = _triton_linear(
                x, weight, blocks, scale_deviation, lora_a, lora_b, bias,
                draw_seed(x) if drop else None, lora_scaling, lora_dropout, diagonal,
                channel_first,
            )  # fmt: skip
            return y
        mask = torch.rand(x.shape, device=x.device) >= lora_dropout if drop else None
        arguments = (
            x, weight, blocks, scale_deviation, lora_a, lora_b, bias, mask,
            float(lora_scaling), float(lora_dropout), diagonal,
        )  # fmt: skip
        if chosen == "reference":
            return lay_out(reference_linear(*arguments), channel_first)
        check_frozen(weight)
        return lay_out(TorchProdialLinear.apply(*arguments), channel_first)


def lay_out(y: Tensor, channel_first: bool) -> Tensor:
    """[..., l, N] -> contiguous [..., N, l] where ``channel_first``, else ``y`` itself."""
    return y.transpose(-1, -2).contiguous() if channel_first else y


def draw_seed(x: Tensor) -> Tensor:
    """Draw the dropout mask's seed on the device, so that checkpointing and graphs replay it."""
    return torch.randint(2**31 - 1, (1,), device=x.device, dtype=torch.int64)


def _triton_linear(
    x: Tensor,
    weight: Tensor,
    blocks: Tensor | None,
    scale_deviation: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    lora_scaling: float,
    lora_dropout: float,
    diagonal: str,
    channel_first: bool,
) -> Tensor:
    """Bring the operands into layouts that the kernels take, and the result into the one asked."""
    length = x.shape[-2] if channel_first and direct_length(x.shape[-2]) else 0
    # The kernels take one stride per matrix and none per vector; what has others is copied here.
    y = TritonProdialLinear.apply(
        x, unit_stride_rows(weight), contiguous(blocks),
        contiguous(scale_deviation), contiguous(lora_a), contiguous(lora_b), contiguous(bias),
        seed, float(lora_scaling), float(lora_dropout), diagonal == "relu", length,
    )  # fmt: skip
    return y if length else lay_out(y, channel_first)


def contiguous(part: Tensor | None) -> Tensor | None:
    """Return a part of the adapter as the kernels take it: without strides, or None."""
    return None if part is None else part.contiguous()
