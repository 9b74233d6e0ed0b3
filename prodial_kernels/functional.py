"""The front door: check, choose an implementation, compute. Every projection comes through here."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from prodial_kernels._checks import DIAGONALS, check_choice, check_dropout, check_finite
from prodial_kernels._validation import check_fp8, check_frozen, check_operands, check_triton
from prodial_kernels.kernels.projector.operands import Impl, Operands, ProjectionOptions
from prodial_kernels.ops.autocast import autocast_dtype, autocast_off
from prodial_kernels.ops.function import differentiable_projection
from prodial_kernels.ops.implementation import resolve_impl
from prodial_kernels.ops.layout import lay_out, unit_stride_rows
from prodial_kernels.ops.reference import reference_linear, scale_deviation_of


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
    operands = Operands(weight, blocks, deviation, lora_a, lora_b, bias)
    options = ProjectionOptions(cast(Impl, impl), lora_scaling, lora_dropout, diagonal)
    return checked_linear(x, operands, options, training=training, channel_first=channel_first)


def checked_linear(
    x: Tensor,
    operands: Operands,
    options: ProjectionOptions,
    *,
    training: bool = False,
    channel_first: bool = False,
) -> Tensor:
    """:func:`prodial_linear` of a projector as a layer keeps it: with s − 1, and maybe packed.

    Args:
        x: [..., in_features].
        operands: Of a packed weight, a stand-in with its shape, dtype and device. ``noise`` is
            drawn in here.
        options: As they were asked for, ``impl="auto"`` included. ``"reference"`` keeps the dense
            weight until backward, the others keep packed tensors packed.
        training: Whether dropout is active.
        channel_first: Return contiguous [..., out_features, l].

    Raises:
        RuntimeError, TypeError, ValueError: As :func:`prepared`.
    """
    cast_to = autocast_dtype(x)
    if cast_to is not None and x.is_floating_point():
        x = x.to(cast_to)
    operands, options = _prepared(x, operands, options, training, cast_to)
    if options.impl == "reference":
        with autocast_off(x.device.type):
            return lay_out(reference_linear(x, operands, options), channel_first)
    return differentiable_projection(x, operands, options, channel_first=channel_first)


def prepared(
    x: Tensor, operands: Operands, options: ProjectionOptions, *, training: bool = False
) -> tuple[Operands, ProjectionOptions]:
    """Check what is asked for, and return what is computed with: dtypes, choice and dropout.

    Under autocast the weight and the bias are cast; the adapter keeps its dtype. A packed weight
    becomes a shape without values (meta device), unless ``impl="reference"`` unpacks it.

    Args:
        x: [..., in_features]; shape, dtype and device count, so that a call can be prepared before
            its input exists.
        operands: As in :func:`checked_linear`, and so are the others.
        options: As they were asked for.
        training: Whether dropout is active, and so drawn.

    Raises:
        RuntimeError: The kernels cannot run on this device.
        TypeError: A dtype that cannot be used, or an option of the wrong kind.
        ValueError: A shape, device or choice that does not fit, or a weight that requires a
            gradient (``"reference"`` and ``"plain"`` give one).
    """
    cast_to = autocast_dtype(x)
    if cast_to is not None and x.is_floating_point():
        x = x.new_empty(1, dtype=cast_to).expand(x.shape)
    return _prepared(x, operands, options, training, cast_to)


def _prepared(
    x: Tensor,
    operands: Operands,
    options: ProjectionOptions,
    training: bool,
    cast_to: torch.dtype | None,
) -> tuple[Operands, ProjectionOptions]:
    """:func:`prepared` of an ``x`` that autocast has cast to this dtype."""
    impl, lora_scaling, lora_dropout, diagonal, packed, compute = options
    if impl != "plain":
        check_choice("diagonal", diagonal, DIAGONALS)
        check_dropout(lora_dropout)
        if not torch.compiler.is_compiling():
            check_finite("lora_scaling", lora_scaling)
    check_operands(x, *operands[:6], autocast=cast_to is not None)
    dtype = x.dtype
    chosen = impl if impl == "plain" else resolve_impl(impl, x)
    if impl == "triton":
        check_triton(x)
    weight, blocks, scale_deviation, lora_a, lora_b, bias, _ = operands
    if compute == "fp8":
        check_fp8(x, blocks, stored=packed is not None, asked=impl, chosen=chosen)
    if bias is not None and (cast_to is not None or packed is not None):
        bias = bias.to(dtype)
    if packed is None:
        if chosen in ("torch", "triton"):
            check_frozen(weight)
        weight = weight if cast_to is None else weight.to(dtype)
    elif chosen == "reference":
        weight, packed = packed.dense(dtype), None
    else:
        weight = torch.empty(weight.shape, dtype=dtype, device="meta")
    noise = None
    dropped = training and lora_dropout > 0.0 and lora_a is not None
    if chosen == "triton":
        # The kernels take one stride per matrix and none per vector; what has others is copied.
        weight = unit_stride_rows(weight)
        blocks, scale_deviation, lora_a, lora_b, bias = map(
            _contiguous, (blocks, scale_deviation, lora_a, lora_b, bias)
        )
        if dropped:
            # Drawn on the device, so that checkpointing and graphs replay it.
            noise = torch.randint(2**31 - 1, (1,), device=x.device, dtype=torch.int64)
    elif dropped:
        noise = torch.rand(x.shape, device=x.device) >= lora_dropout
    return (
        Operands(weight, blocks, scale_deviation, lora_a, lora_b, bias, noise),
        ProjectionOptions(
            chosen, float(lora_scaling), float(lora_dropout), diagonal, packed, compute
        ),
    )


def _contiguous(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.contiguous()
