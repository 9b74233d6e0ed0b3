"""The launches of a projector whose weight is nothing beside its activations.

The adapter is added into the weight, W' = s ⊙ (W D_b) + α B A, made anew in either direction, so
that each is one product; and every gradient of the adapter comes from F = dYᵀ X, as for wide ranks.
Neither Y nor H is read, nor dX a second time.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from prodial_kernels.kernels.choices.small_weight import (
    choose_small_gemm,
    choose_sums,
)
from prodial_kernels.kernels.choices.tile_sizes import choose_output_side, padded_rank
from prodial_kernels.kernels.projector.gemm import launch_gemm
from prodial_kernels.kernels.projector.input_side import InputSums
from prodial_kernels.kernels.projector.operands import (
    Gradients,
    Needs,
    Operands,
    ProjectionOptions,
)
from prodial_kernels.kernels.projector.outer_product import launch_outer_product, launch_tile_sums
from prodial_kernels.kernels.projector.output_side import OutputSums, launch_output_side
from prodial_kernels.kernels.projector.passes import device_limits, new_gradients
from prodial_kernels.kernels.projector.pdl import supports_pdl
from prodial_kernels.kernels.projector.prepare import launch_sum
from prodial_kernels.kernels.projector.reduce import launch_reduce
from prodial_kernels.kernels.projector.tiles import block_size_of, tma_ready
from prodial_kernels.kernels.projector.weight_side import launch_weight_side


def forward(x: Tensor, operands: Operands, options: ProjectionOptions) -> tuple[Tensor]:
    """Return Y = X W'ᵀ + b, [M, N], for X [M, K]."""
    y = x.new_empty(x.shape[0], operands.weight.shape[0])
    pdl = supports_pdl(device_limits(x.device).capability, x)
    summed = launch_sum(operands, options, triggers_next=pdl)
    _multiply(
        x, summed, y, v_transposed=True, bias=operands.bias,
        pdl=pdl and summed is not operands.weight,
    )  # fmt: skip
    return (y,)


def backward(
    dy: Tensor, x: Tensor, operands: Operands, options: ProjectionOptions, needs: Needs
) -> Gradients:
    """Return the gradients that are asked for, from dY [M, N] and X [M, K], M > 0."""
    parts = (x, *operands[:-1])
    needs = Needs(*(need and part is not None for need, part in zip(needs, parts, strict=True)))
    gradients = new_gradients(operands, needs)
    limits = device_limits(dy.device)
    dx = dy.new_empty(x.shape) if needs.x else None
    if needs.bias:
        m, n = dy.shape
        walk = choose_output_side(
            m, n, 16, bias=True, capability=limits.capability, programs=limits.processors
        )
        only = Needs(False, False, False, False, False, False, True)
        bare = Operands(operands.weight, bias=operands.bias)
        _, _, bias = launch_output_side(dy, None, None, bare, options, only, config=walk)
        # Apart, because it comes in more parts than the others.
        launch_reduce(
            OutputSums(bias=bias), InputSums(), Gradients(bias=gradients.bias), bare, options
        )
    pdl = supports_pdl(limits.capability, dy)
    summed = operands.weight
    if dx is not None:
        summed = launch_sum(operands, options, triggers_next=pdl)
    behind_sum = pdl and summed is not operands.weight
    if any(needs[2:-1]):
        # What the parts take lies where dX will be, which is made last.
        _sum_gradients(dy, x, operands, options, needs, gradients, scratch=dx, beside=behind_sum)
        behind_sum = False
    if dx is not None:
        _multiply(dy, summed, dx, v_transposed=False, pdl=behind_sum)
    return gradients._replace(x=dx)


def _sum_gradients(
    dy: Tensor,
    x: Tensor,
    operands: Operands,
    options: ProjectionOptions,
    needs: Needs,
    gradients: Gradients,
    *,
    scratch: Tensor | None,
    beside: bool,
) -> None:
    """Write the gradients of the blocks, s, A and B that are given.

    ``scratch`` is overwritten. ``beside``: what comes before triggers, and makes nothing for this.
    """
    limits = device_limits(dy.device)
    n, k = operands.weight.shape
    rank = 0 if operands.lora_a is None else operands.lora_a.shape[0]
    config = choose_sums(
        n, k, r_pad=padded_rank(rank), block_size=block_size_of(operands.blocks),
        tma=tma_ready(dy) and tma_ready(x), limits=limits,
    )  # fmt: skip
    pdl = config is not None and supports_pdl(limits.capability, dy)
    if config is not None:
        sums = launch_tile_sums(
            dy, x, operands, options, needs, config=config, scratch=scratch, triggers_next=pdl,
            beside=beside,
        )  # fmt: skip
    else:
        hopper = limits.capability[0] == 9
        f = launch_outer_product(dy, x, programs=limits.processors, scratch=scratch, hopper=hopper)
        sums = launch_weight_side(f, operands, options, needs)
    launch_reduce(
        OutputSums(scale=sums.scale, b=sums.b), InputSums(sums.a, sums.blocks),
        gradients._replace(bias=None), operands, options, pdl=pdl,
    )  # fmt: skip


def _multiply(
    left: Tensor,
    v: Tensor,
    target: Tensor,
    *,
    v_transposed: bool,
    pdl: bool,
    bias: Tensor | None = None,
) -> None:
    """Write ``left`` V into ``target``, or ``left`` Vᵀ + bias where ``v_transposed``."""
    limits = device_limits(left.device)
    config = choose_small_gemm(target.shape[1], limits)
    launch_gemm(
        left, v, target, v_transposed=v_transposed, bias=bias,
        config=replace(config, pdl=pdl and config.tma),
    )  # fmt: skip


# The same of flat operands, as the recording of launches takes them.


def recorded_forward(x: Tensor, *operands_options: Any) -> Sequence[Tensor]:
    """:func:`forward` of X, the fields of ``Operands`` and the options."""
    *operands, options = operands_options
    return forward(x, Operands(*operands), options)


def recorded_backward(dy: Tensor, x: Tensor, *operands_options_needs: Any) -> Gradients:
    """:func:`backward` of dY, X, the fields of ``Operands``, options and needs."""
    *operands, options, needs = operands_options_needs
    return backward(dy, x, Operands(*operands), options, needs)
