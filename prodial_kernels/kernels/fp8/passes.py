"""The order of launches of a projector whose large products are in fp8.

The weight stays as it is stored. X D_bᵀ and dY ⊙ s are rounded in the pass that makes them, which
is the one that makes H or T as well; the sums over the tokens are those of the 16-bit projector.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from prodial_kernels.kernels.choices.tile_sizes import (
    DeviceLimits,
    choose_input_side,
    choose_output_side,
    padded_rank,
)
from prodial_kernels.kernels.fp8.exact_scale import launch_exact_scale
from prodial_kernels.kernels.fp8.library import (
    launch_finish,
    library_product,
    takes_library,
    takes_pipelined,
)
from prodial_kernels.kernels.fp8.product import choose_product, launch_product
from prodial_kernels.kernels.fp8.quantize import GROUP, Rounded, launch_quantize
from prodial_kernels.kernels.fp8.rounding_side import choose_rounding_side, launch_rounding_side
from prodial_kernels.kernels.fp8.transpose import launch_transpose
from prodial_kernels.kernels.projector.input_side import launch_input_sums
from prodial_kernels.kernels.projector.low_rank import launch_low_rank_sum
from prodial_kernels.kernels.projector.operands import (
    Gradients,
    Kept,
    Needs,
    Operands,
    ProjectionOptions,
)
from prodial_kernels.kernels.projector.output_side import OutputSums, launch_output_side
from prodial_kernels.kernels.projector.passes import device_limits, new_gradients
from prodial_kernels.kernels.projector.prepare import launch_low_rank, launch_prepare
from prodial_kernels.kernels.projector.reduce import launch_reduce
from prodial_kernels.kernels.projector.tiles import block_size_of
from prodial_kernels.kernels.replay.recorded_calls import replayed

# The padded rank up to which rounding makes the low-rank product too, whose factor takes the
# chip's memory.
MOST_FUSED = 32


def forward(
    x: Tensor, scale_inv: Tensor, operands: Operands, options: ProjectionOptions
) -> tuple[Tensor, Tensor | None]:
    """Return Y [M, N] and H [M, R_PAD] (None without LoRA) for X [M, K].

    ``operands.weight`` holds W's codes, [N, K] float8_e4m3fn, and ``scale_inv`` their scales.
    Blocks are of a size that a tile holds.
    """
    codes, _, scale_deviation, _, lora_b, bias, _ = operands
    m, n = x.shape[0], codes.shape[0]
    rounded, h = round_input(x, operands, options)
    y = x.new_empty(m, n)
    added: Any = {
        "scale_deviation": scale_deviation, "low": h, "outer": lora_b, "alpha": options.lora_scaling
    }  # fmt: skip
    limits = device_limits(x.device)
    if _pipelines(m, operands, limits, towards_input=False):
        _launch_pipelined(rounded, codes, scale_inv, y, limits, **added)
    else:
        config = choose_product(limits)
        launch_product(rounded, codes, scale_inv, y, config=config, bias=bias, **added)
    return y, h


def round_input(
    x: Tensor, operands: Operands, options: ProjectionOptions
) -> tuple[Rounded, Tensor | None]:
    """Return X D_bᵀ in fp8 and H, as :func:`forward`."""
    lora_a, seed = operands.lora_a, operands.noise
    r_pad = 16 if lora_a is None else padded_rank(lora_a.shape[0])
    source, factor = _rotated(x, operands, options)
    fused = lora_a if source is x and seed is None and r_pad <= MOST_FUSED else None
    rounded, h = launch_quantize(
        source, factor=factor, relu=options.diagonal == "relu", inner=fused, r_pad=r_pad,
        programs=device_limits(x.device).processors,
    )  # fmt: skip
    if lora_a is not None and fused is None:
        h = launch_low_rank(x, lora_a, options, r_pad, transposed=True, seed=seed)
    return rounded, h


def backward(
    dy: Tensor,
    x: Tensor,
    scale_inv: Tensor,
    operands: Operands,
    kept: Kept,
    options: ProjectionOptions,
    needs: Needs,
) -> Gradients:
    """Return the gradients that are asked for, from dY [M, N], X [M, K], and Y and H as kept.

    ``operands`` and ``scale_inv`` as in :func:`forward`.
    """
    needs = _possible(needs, x, operands)
    if dy.shape[0] == 0:
        parts = (x, *operands[:-1])
        return Gradients(
            *(torch.zeros_like(part) if part is not None and need else None
              for part, need in zip(parts, needs, strict=True))
        )  # fmt: skip
    sums, gradient = output_side(dy, x, scale_inv, operands, kept, options, needs)
    du = None
    if gradient.rounded is not None and gradient.transposed is not None:
        du = dy.new_empty(x.shape)
        weight, scales = gradient.transposed
        limits = device_limits(dy.device)
        if _pipelines(dy.shape[0], operands, limits, towards_input=True):
            _launch_pipelined(gradient.rounded, weight, scales, du, limits)
        else:
            config = choose_product(limits)
            launch_product(gradient.rounded, weight, scales, du, config=config)
    return input_side(x, du, gradient.t, sums, operands, options, needs)


def _pipelines(m: int, operands: Operands, limits: DeviceLimits, *, towards_input: bool) -> bool:
    """Whether the product of :func:`forward`, or :func:`backward`, is the pipelined one."""
    n, k = operands.weight.shape
    if towards_input:
        return takes_pipelined(m, k, n, limits, finish=False)
    r_pad = 16 if operands.lora_b is None else padded_rank(operands.lora_b.shape[1])
    finish = _finishes(operands)
    taken = takes_pipelined(m, n, k, limits, finish=finish, r_pad=r_pad)
    return taken and operands.bias is None


def _launch_pipelined(
    x: Rounded, codes: Tensor, scale_inv: Tensor, y: Tensor, limits: DeviceLimits, **added: Any
) -> None:
    """Imported where it is taken: Gluon is still an experiment of Triton's."""
    from prodial_kernels.kernels.fp8.pipelined import choose_pipelined, launch_pipelined_product

    config = choose_pipelined(codes.shape[1], limits)
    launch_pipelined_product(x, codes, scale_inv, y, config=config, **added)


class OutputGradient(NamedTuple):
    """What the product towards the input takes: dY ⊙ s in fp8, Wᵀ; and T. None if not asked for."""

    rounded: Rounded | None
    transposed: tuple[Tensor, Tensor] | None
    t: Tensor | None


def output_side(
    dy: Tensor,
    x: Tensor,
    scale_inv: Tensor,
    operands: Operands,
    kept: Kept,
    options: ProjectionOptions,
    needs: Needs,
) -> tuple[OutputSums, OutputGradient]:
    """The part of :func:`backward` before the product; ``needs`` asks for what there is."""
    codes, _, scale_deviation, lora_a, lora_b, bias, _ = operands
    m, n = dy.shape
    limits = device_limits(dy.device)
    r_pad = 16 if lora_b is None else padded_rank(lora_b.shape[1])
    sums = OutputSums()
    if _in_one_read(n, operands, needs):
        tile = choose_rounding_side(m, n, limits)
        low = kept.h if needs.lora_b else None
        made = launch_rounding_side(
            dy, kept.y if needs.scale else None, low, operands, options, config=tile
        )
        t = (
            None
            if made.t_parts is None
            else launch_low_rank_sum(made.t_parts, dy.dtype, options).low
        )
        exact = _exact(dy, x, scale_inv, made.scale, operands, options)
        sums = OutputSums(made.b, made.scale, exact)
        return sums, OutputGradient(made.rounded, launch_transpose(codes, scale_inv), t)
    if needs.lora_b or needs.scale or needs.bias:
        walk = choose_output_side(
            m, n, r_pad, bias=bias is not None, capability=limits.capability,
            programs=limits.processors,
        )  # fmt: skip
        low = kept.h if needs.scale or needs.lora_b else None
        b, scale, dbias = launch_output_side(dy, kept.y, low, operands, options, needs, config=walk)
        exact = _exact(dy, x, scale_inv, scale, operands, options)
        sums = OutputSums(b, scale, exact, dbias)
    wanted = lora_b if lora_a is not None and (needs.x or needs.lora_a) else None
    if not (needs.x or needs.blocks):
        t = None if wanted is None else launch_low_rank(dy, wanted, options, r_pad)
        return sums, OutputGradient(None, None, t)
    fused = wanted if r_pad <= MOST_FUSED else None
    rounded, t = launch_quantize(
        dy, factor=scale_deviation, inner=fused, transposed=False, r_pad=r_pad,
        alpha=options.lora_scaling, programs=limits.processors,
    )  # fmt: skip
    if wanted is not None and fused is None:
        t = launch_low_rank(dy, wanted, options, r_pad)
    # The tensor cores of Hopper take fp8 with the summed dimension innermost, and only so.
    return sums, OutputGradient(rounded, launch_transpose(codes, scale_inv), t)


def input_side(
    x: Tensor,
    du: Tensor | None,
    t: Tensor | None,
    sums: OutputSums,
    operands: Operands,
    options: ProjectionOptions,
    needs: Needs,
) -> Gradients:
    """The part of :func:`backward` after the product; dX takes the place of ``du``."""
    gradients = new_gradients(operands, needs)
    m, k = x.shape
    r_pad = 16 if operands.lora_b is None else padded_rank(operands.lora_b.shape[1])
    walk = choose_input_side(
        m, k, r_pad, block_size_of(operands.blocks), dropout=operands.noise is not None,
        channel_first=False, capability=device_limits(x.device).capability,
    )  # fmt: skip
    inputs = launch_input_sums(du, x, t, operands, options, needs, config=walk, triggers_next=False)
    launch_reduce(sums, inputs, gradients, operands, options)
    return gradients._replace(x=du if needs.x else None)


def _in_one_read(n: int, operands: Operands, needs: Needs) -> bool:
    """Whether dY is rounded in the read that makes the sums, and T."""
    if n % GROUP or operands.bias is not None or not (needs.x or needs.blocks):
        return False
    if operands.scale_deviation is not None and not needs.scale:
        return False
    if operands.lora_b is None:
        return needs.scale
    r_pad = padded_rank(operands.lora_b.shape[1])
    return operands.lora_a is not None and needs.lora_b and r_pad <= MOST_FUSED


def _exact(
    dy: Tensor,
    x: Tensor,
    scale_inv: Tensor,
    scale: Tensor | None,
    operands: Operands,
    options: ProjectionOptions,
) -> Tensor | None:
    """ds anew, of columns whose parts ask for it."""
    if scale is None:
        return None
    source, factor = _rotated(x, operands, options)
    return launch_exact_scale(
        dy, source, operands.weight, scale_inv, scale, factor=factor,
        relu=options.diagonal == "relu",
    )  # fmt: skip


def _possible(needs: Needs, x: Tensor, operands: Operands) -> Needs:
    """What is asked for of what there is."""
    parts = (x, *operands[:-1])
    return Needs(*(need and part is not None for need, part in zip(needs, parts, strict=True)))


def _rotated(
    x: Tensor, operands: Operands, options: ProjectionOptions
) -> tuple[Tensor, Tensor | None]:
    """(what is rounded, what it is multiplied by first): X and D_a of 1×1 blocks, or U and None."""
    blocks = operands.blocks
    if blocks is None or block_size_of(blocks) == 1:
        return x, blocks
    alone = Operands(operands.weight, blocks)
    return launch_prepare(alone, options, r_pad=16, activations=x).v, None


# The same of flat operands, as the recording of launches takes them: whole, and where a library
# makes the product, which cannot be recorded, in parts.


def recorded_forward(
    x: Tensor, scale_inv: Tensor, *operands_options: Any
) -> tuple[Tensor, Tensor | None]:
    """:func:`forward` of X, the weight's scales, the fields of ``Operands`` and the options."""
    *operands, options = operands_options
    return forward(x, scale_inv, Operands(*operands), options)


def recorded_backward(
    dy: Tensor, x: Tensor, scale_inv: Tensor, *operands_kept_options_needs: Any
) -> Gradients:
    """:func:`backward` of the same and dY, and the fields of ``Kept``, options and needs."""
    *tensors, options, needs = operands_kept_options_needs
    return backward(dy, x, scale_inv, Operands(*tensors[:7]), Kept(*tensors[7:]), options, needs)


def forward_by_library(
    x: Tensor, scale_inv: Tensor, operands: Operands, options: ProjectionOptions
) -> tuple[Tensor, Tensor | None]:
    """:func:`forward` with cuBLAS's product, and what it lacks in a pass over Y."""
    codes, scales, h = replayed(_recorded_input, (x, *operands), (options,))
    y = library_product(Rounded(codes, scales), operands.weight, scale_inv, x.dtype)
    if _finishes(operands):
        added = operands.scale_deviation, operands.lora_b, operands.bias
        replayed(launch_finish, (y, h, *added), (options.lora_scaling,))
    return y, h


def backward_by_library(
    dy: Tensor,
    x: Tensor,
    scale_inv: Tensor,
    operands: Operands,
    kept: Kept,
    options: ProjectionOptions,
    needs: Needs,
) -> Gradients:
    """:func:`backward` with cuBLAS's product."""
    needs = _possible(needs, x, operands)
    tensors = (dy, x, scale_inv, *operands, *kept)
    parts: Any = replayed(_recorded_output_side, tensors, (options, needs))
    *sums, codes, scales, transposed, of_transposed, t = parts
    du = library_product(Rounded(codes, scales), transposed, of_transposed, dy.dtype)
    rest = replayed(_recorded_input_side, (x, du, t, *sums, *operands), (options, needs))
    return Gradients(du if needs.x else None, *rest)


def by_library(m: int, operands: Operands, device: torch.device, *, towards_input: bool) -> bool:
    """Whether :func:`forward`, or :func:`backward` where ``towards_input``, takes the library's."""
    n, k = operands.weight.shape
    limits = device_limits(device)
    if _pipelines(m, operands, limits, towards_input=towards_input):
        return False
    if towards_input:
        return takes_library(m, k, n, limits, finish=False)
    return takes_library(m, n, k, limits, finish=_finishes(operands))


def _finishes(operands: Operands) -> bool:
    parts = operands.scale_deviation, operands.lora_b, operands.bias
    return any(part is not None for part in parts)


def _recorded_input(x: Tensor, *operands_options: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    *operands, options = operands_options
    rounded, h = round_input(x, Operands(*operands), options)
    return *rounded, h


def _recorded_output_side(
    dy: Tensor, x: Tensor, scale_inv: Tensor, *operands_kept_options_needs: Any
) -> tuple[Tensor | None, ...]:
    *tensors, options, needs = operands_kept_options_needs
    operands, kept = Operands(*tensors[:7]), Kept(*tensors[7:])
    sums, gradient = output_side(dy, x, scale_inv, operands, kept, options, needs)
    rounded = gradient.rounded or (None, None)
    transposed = gradient.transposed or (None, None)
    return *sums, *rounded, *transposed, gradient.t


def _recorded_input_side(
    x: Tensor, du: Tensor, t: Tensor | None, *sums_operands_options_needs: Any
) -> tuple[Tensor | None, ...]:
    *tensors, options, needs = sums_operands_options_needs
    sums, operands = OutputSums(*tensors[:4]), Operands(*tensors[4:])
    return input_side(x, du, t, sums, operands, options, needs)[1:]
