"""The launches of a projector whose weight is nothing beside its activations.

The adapter is added into the weight, W' = s ⊙ (W D_b) + α B A, made anew in either direction, so
that each is one product; and every gradient of the adapter comes from F = dYᵀ X, as for wide ranks.
Neither Y nor H is read, nor dX a second time.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from prodial_kernels.kernels.choices.small_weight import choose_small_gemm
from prodial_kernels.kernels.choices.tile_sizes import choose_output_side
from prodial_kernels.kernels.projector.gemm import launch_gemm
from prodial_kernels.kernels.projector.input_side import InputSums
from prodial_kernels.kernels.projector.operands import (
    Gradients,
    Needs,
    Operands,
    ProjectionOptions,
)
from prodial_kernels.kernels.projector.outer_product import launch_outer_product
from prodial_kernels.kernels.projector.output_side import OutputSums, launch_output_side
from prodial_kernels.kernels.projector.passes import device_limits, new_gradients
from prodial_kernels.kernels.projector.pdl import supports_pdl
from prodial_kernels.kernels.projector.prepare import launch_sum
from prodial_kernels.kernels.projector.reduce import launch_reduce
from prodial_kernels.kernels.projector.weight_side import launch_weight_side


def forward(x: Tensor, operands: Operands, options: ProjectionOptions) -> tuple[Tensor]:
    """Return Y = X W'ᵀ + b, [M, N], for X [M, K]."""
    n = operands.weight.shape[0]
    limits = device_limits(x.device)
    pdl = supports_pdl(limits.capability, x)
    config = choose_small_gemm(n, limits)
    summed = launch_sum(operands, options, triggers_next=pdl)
    y = x.new_empty(x.shape[0], n)
    launch_gemm(
        x, summed, y, v_transposed=True, bias=operands.bias,
        config=replace(config, pdl=pdl and config.tma and summed is not operands.weight),
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
    hopper = limits.capability[0] == 9
    pdl = supports_pdl(limits.capability, dy)
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
    if any(needs[2:-1]):
        # The parts of F lie where dX will be, which is made last.
        f = launch_outer_product(dy, x, programs=limits.processors, scratch=dx, hopper=hopper)
        sums = launch_weight_side(f, operands, options, needs)
        launch_reduce(
            OutputSums(scale=sums.scale, b=sums.b), InputSums(sums.a, sums.blocks),
            gradients._replace(bias=None), operands, options,
        )  # fmt: skip
    if dx is not None:
        config = choose_small_gemm(x.shape[1], limits)
        summed = launch_sum(operands, options, triggers_next=pdl)
        launch_gemm(
            dy, summed, dx, v_transposed=False,
            config=replace(config, pdl=pdl and config.tma and summed is not operands.weight),
        )  # fmt: skip
    return gradients._replace(x=dx)


# The same of flat operands, as the recording of launches takes them.


def recorded_forward(x: Tensor, *operands_options: Any) -> Sequence[Tensor]:
    """:func:`forward` of X, the fields of ``Operands`` and the options."""
    *operands, options = operands_options
    return forward(x, Operands(*operands), options)


def recorded_backward(dy: Tensor, x: Tensor, *operands_options_needs: Any) -> Gradients:
    """:func:`backward` of dY, X, the fields of ``Operands``, options and needs."""
    *operands, options, needs = operands_options_needs
    return backward(dy, x, Operands(*operands), options, needs)
