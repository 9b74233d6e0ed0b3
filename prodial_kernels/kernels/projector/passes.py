"""The order in which the kernels are launched, forward and backward."""

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, TypedDict

import torch
from torch import Tensor

from prodial_kernels.kernels.choices.backward_plan import choose_backward
from prodial_kernels.kernels.choices.partition import ceil_div, fold_programs
from prodial_kernels.kernels.choices.tile_sizes import (
    NARROW,
    begins_early,
    choose_exact_scale,
    choose_gemm,
    choose_input_side,
    choose_low_rank,
    columns_apart,
    padded_rank,
    panels,
    rides_forward,
    turns_tokens,
)
from prodial_kernels.kernels.projector.early_launch import overlaps
from prodial_kernels.kernels.projector.gemm import launch_gemm
from prodial_kernels.kernels.projector.input_sums import launch_input_sums
from prodial_kernels.kernels.projector.operands import (
    Gradients,
    Kept,
    Needs,
    Operands,
    ProjectionOptions,
)
from prodial_kernels.kernels.projector.output_sums import OutputSums, launch_output_sums
from prodial_kernels.kernels.projector.prepare import launch_low_rank, launch_prepare
from prodial_kernels.kernels.projector.reduce import launch_reduce
from prodial_kernels.kernels.projector.tiles import block_size_of, tma_ready, token_shape
from prodial_kernels.kernels.projector.weight_side import launch_weight_side
from prodial_kernels.kernels.replay.recorder import fork, join


def forward(
    x: Tensor, operands: Operands, options: ProjectionOptions, length: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Return Y and H [M, R_PAD] (None without LoRA) for X, [M, K] or channel-first [b, K, l].

    Y is channel-first [M / length, N, length] where a ``length`` is given, else [M, N].
    """
    weight, blocks, scale_deviation, lora_a, lora_b, bias, seed = operands
    alpha, dropout, relu = options.lora_scaling, options.lora_dropout, options.diagonal == "relu"
    r_pad = 16 if lora_a is None else padded_rank(lora_a.shape[0])
    limits = device_limits(x.device)
    m, n = token_shape(x)[0], weight.shape[0]
    # H is of X as it is, and of tokens by rows.
    rides = (
        lora_a is not None and seed is None and not length and _aligned(x, weight)
        and rides_forward(n, r_pad, capability=limits["capability"])
    )  # fmt: skip
    turns = turns_tokens(
        m, n, blocks=blocks is not None, scale=scale_deviation is not None,
        channel_first=x.ndim == 3, rides=rides,
    )  # fmt: skip
    rides = rides and not (turns and blocks is not None)
    config = choose_gemm(*((n, m) if length else (m, n)), whole=length > 0, **limits)
    y = x.new_empty((m // length if length else 0, n, length) if length else (m, n))
    folds = (blocks is not None or scale_deviation is not None) and not turns
    parts = panels(m, n, _row_bytes(weight, 1), config) if folds else [(0, n)]
    apart = 0
    if len(parts) == 1 and not length and not rides:
        apart = columns_apart(m, n, config, limits["processors"])
    rows = m if turns else parts[0][1]
    passes, p = lora_a is not None and not rides, block_size_of(blocks)
    before = fold_programs(rows, weight.shape[1], p, beside_low=passes)
    if passes:
        before += ceil_div(m, choose_low_rank(m, r_pad, dropout=seed is not None)[0])
    # Only behind a launch of ours is it known that all before has ended, and not beside a fork.
    prepares = folds or blocks is not None or lora_a is not None
    opens = overlaps(limits["capability"], x) and prepares and not apart
    early = opens and begins_early(
        config, before, block_size=p, beside_low=passes, processors=limits["processors"]
    )
    config = replace(config, early=early)
    h = None
    for first, columns in parts:
        passes = passes and h is None
        v, b, low = launch_prepare(
            weight.narrow(0, first, columns), blocks, _part(scale_deviation, first, columns),
            _part(lora_b, first, columns), alpha=alpha, relu=relu, r_pad=r_pad,
            x=x if passes else None, lora_a=lora_a if passes or rides else None, seed=seed,
            dropout=dropout, turned=x if turns else None, opens=early,
        )  # fmt: skip
        if passes:
            h = low
        u, v = (v, weight) if turns else (x, v)
        side = fork(x.device) if apart and x.is_cuda else None
        for at, size, tiles, stream in (
            (0, columns - apart, config, None), (columns - apart, apart, NARROW, side),
        ):  # fmt: skip
            if not size:
                continue
            h = launch_gemm(
                u, v.narrow(0, at, size), y.narrow(1, first + at, size), v_transposed=True,
                config=tiles,
                inner=low if rides else None, outer=_part(b, at, size), low=None if rides else h,
                scale_deviation=_part(scale_deviation, at, size) if turns else None,
                bias=_part(bias, first + at, size), length=length, side=stream,
            )  # fmt: skip
        if side is not None:
            join(side, x.device)
        del u, v  # what is made next takes their place
    return y, h


def backward(
    dy: Tensor,
    x: Tensor,
    operands: Operands,
    kept: Kept,
    options: ProjectionOptions,
    needs: Needs,
) -> Gradients:
    """Return the gradients that are asked for; W is frozen and gets none.

    dY and Y are [M, N] or both channel-first [b, N, l]; X and dX are [M, K] or [b, K, l].
    """
    weight, blocks, scale_deviation, lora_a, lora_b, bias, seed = operands
    y, h, scaled = kept
    alpha, dropout, relu = options.lora_scaling, options.lora_dropout, options.diagonal == "relu"
    m, n = token_shape(dy)
    k = token_shape(x)[1]
    if m == 0:
        parts = zip((x, *operands[:-1]), needs, strict=True)
        return Gradients(
            *(torch.zeros_like(part) if part is not None and need else None for part, need in parts)
        )
    r_pad = 16 if lora_a is None else padded_rank(lora_a.shape[0])
    limits = device_limits(dy.device)
    dscale, db = _like(scale_deviation, needs.scale), _like(lora_b, needs.lora_b)
    dbias, da = _like(bias, needs.bias), _like(lora_a, needs.lora_a)
    dblocks = _like(blocks, needs.blocks)
    through_weight = needs.x or needs.blocks
    opens = overlaps(limits["capability"], dy)
    output_side = dscale is not None or db is not None or dbias is not None
    wants_t = lora_b is not None and (needs.x or needs.lora_a)
    plan = choose_backward(
        m, n, k, r_pad, wants_t=wants_t, output_side=output_side,
        through_weight=through_weight, bias=bias is not None, channel_first=x.ndim == 3, **limits,
    )  # fmt: skip
    product = replace(plan.gemm, early=opens and plan.gemm.early)

    # Beside the product, or in turn.
    sum_outputs = partial(
        launch_output_sums, dy, x, weight, blocks, scale_deviation, lora_b, bias, y, h,
        alpha=alpha, relu=relu,
        need_b=db is not None, need_scale=dscale is not None, need_bias=dbias is not None,
        config=plan.output_side,
        exact=choose_exact_scale(
            limits["capability"], block_size=block_size_of(blocks), even=_even(dy, x, weight),
            among=plan.among,
        ),
    )  # fmt: skip
    side = fork(dy.device) if plan.side_processors and dy.is_cuda else None
    among = plan.among and through_weight
    outputs = OutputSums()
    t: Tensor | None = None
    du: Tensor | None = None
    sw: Tensor | None = None
    if not among:
        outputs = sum_outputs(side=side)
    if wants_t and not plan.companion and lora_b is not None:
        t = launch_low_rank(dy, lora_b, alpha, r_pad, side)
    if through_weight:
        du = dy.new_empty(x.shape)
        folds = scale_deviation is not None and scaled is None
        for first, columns in panels(m, k, _row_bytes(weight, 0), product) if folds else [(0, k)]:
            rides, begins = plan.companion and first == 0, among and first == 0
            sw = None  # what is made next takes its place
            sw, b, _ = launch_prepare(
                (weight if scaled is None else scaled).narrow(1, first, columns), None,
                scale_deviation if folds else None, lora_b if rides else None,
                alpha=alpha, relu=relu, r_pad=r_pad, b_transposed=True, opens=product.early,
            )  # fmt: skip
            if begins and dy.is_cuda:
                side = fork(dy.device)
            companion = launch_gemm(
                dy, sw, du.narrow(1, first, columns), v_transposed=False, config=product,
                inner=b, length=x.shape[2] if x.ndim == 3 else 0,
            )  # fmt: skip
            t = companion if rides else t
            if begins:
                # After it, whose programs find each a multiprocessor of its own only if first.
                outputs = sum_outputs(side=side)
    # The input side needs T; with that at hand, it need not wait for the output side.
    late = side is not None and plan.late and (t is None or plan.companion)
    if side is not None and not late:
        join(side, dy.device)
    # Not before: what the side stream writes must not take its place while the product reads it.
    del sw
    config = choose_input_side(
        m, k, r_pad, block_size_of(blocks), dropout=seed is not None,
        channel_first=x.ndim == 3, capability=limits["capability"],
    )  # fmt: skip
    inputs = launch_input_sums(
        du, x, t, lora_a, blocks, seed=seed, dropout=dropout, relu=relu,
        need_x=needs.x, need_a=da is not None, need_blocks=dblocks is not None,
        config=config, opens=opens,
    )  # fmt: skip
    if side is not None and late:
        join(side, dy.device)
    launch_reduce(
        outputs.b, outputs.scale, outputs.exact, outputs.bias, inputs.a, inputs.blocks,
        blocks=blocks, db=db, dscale=dscale, dbias=dbias, da=da, dblocks=dblocks,
        n=n, k=k, r=0 if lora_a is None else lora_a.shape[0], r_pad=r_pad,
        alpha=alpha, relu=relu,
        early=opens and inputs.launched and not late,
    )  # fmt: skip
    return Gradients(du if needs.x else None, None, dblocks, dscale, da, db, dbias)


def _even(*matrices: Tensor) -> bool:
    """Whether the rows of all are tokens, and begin at multiples of 16 elements."""
    return all(matrix.ndim == 2 and matrix.stride(0) % 16 == 0 for matrix in matrices)


def _like(part: Tensor | None, need: bool) -> Tensor | None:
    return torch.empty_like(part) if need and part is not None else None


def _part(rows: Tensor | None, first: int, size: int) -> Tensor | None:
    return None if rows is None else rows.narrow(0, first, size)


def _row_bytes(weight: Tensor, dim: int) -> int:
    """Bytes of the weight along one dimension."""
    return weight.shape[dim] * weight.element_size()


def _aligned(x: Tensor, weight: Tensor) -> bool:
    """Whether the copy engine can load X, W and all that is made of them."""
    return all(size % 8 == 0 for size in weight.shape) and tma_ready(x) and tma_ready(weight)


def scaled_weight(weight: Tensor, scale_deviation: Tensor) -> tuple[Tensor]:
    """Return s ⊙ W, [N, K], as :func:`backward` makes it."""
    made, *_ = launch_prepare(weight, None, scale_deviation, None, alpha=1.0, relu=True, r_pad=16)
    return (made,)


def weight_sums(
    f: Tensor, operands: Operands, options: ProjectionOptions, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """Return ds and dD_a, those asked for, from F = dYᵀ X [N, K]."""
    weight, blocks, scale_deviation, *_ = operands
    relu = options.diagonal == "relu"
    dscale, dblocks = _like(scale_deviation, needs.scale), _like(blocks, needs.blocks)
    if dscale is None and dblocks is None:
        return None, None
    partial_scale, partial_e = launch_weight_side(
        f, weight, blocks, scale_deviation, relu=relu, need_scale=dscale is not None,
        need_blocks=dblocks is not None,
    )  # fmt: skip
    launch_reduce(
        None, partial_scale, None, None, None, partial_e,
        blocks=blocks, db=None, dscale=dscale, dbias=None, da=None, dblocks=dblocks,
        n=weight.shape[0], k=weight.shape[1], r=0, r_pad=16, alpha=1.0, relu=relu,
    )  # fmt: skip
    return dscale, dblocks


# The same of flat operands, as the recording of launches takes them.


def recorded_forward(x: Tensor, *operands_options_length: Any) -> tuple[Tensor, Tensor | None]:
    """:func:`forward` of X, the fields of ``Operands``, the options and the length."""
    *operands, options, length = operands_options_length
    return forward(x, Operands(*operands), options, length)


def recorded_backward(dy: Tensor, x: Tensor, *operands_kept_options_needs: Any) -> Gradients:
    """:func:`backward` of dY, X, the fields of ``Operands`` and of ``Kept``, options and needs."""
    *tensors, options, needs = operands_kept_options_needs
    return backward(dy, x, Operands(*tensors[:7]), Kept(*tensors[7:]), options, needs)


def recorded_weight_sums(
    f: Tensor, weight: Tensor, blocks: Tensor | None, scale_deviation: Tensor | None,
    options: ProjectionOptions, needs: Needs,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """:func:`weight_sums` of F and what it reads of ``Operands``."""
    return weight_sums(f, Operands(weight, blocks, scale_deviation), options, needs)


class DeviceLimits(TypedDict):
    """What the choice of tile sizes needs to know of a device."""

    capability: tuple[int, int]
    processors: int


@lru_cache
def device_limits(device: torch.device) -> DeviceLimits:
    """Compute capability and number of multiprocessors, of a Hopper under the interpreter."""
    if device.type != "cuda":
        return {"capability": (9, 0), "processors": 4}
    properties = torch.cuda.get_device_properties(device)
    return {
        "capability": (properties.major, properties.minor),
        "processors": properties.multi_processor_count,
    }
