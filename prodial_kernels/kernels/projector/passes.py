"""The order in which the kernels are launched, forward and backward."""

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from prodial_kernels.kernels.choices.backward_plan import choose_backward
from prodial_kernels.kernels.choices.forward_plan import NARROW, ForwardPlan, choose_forward
from prodial_kernels.kernels.choices.tile_sizes import (
    DeviceLimits,
    choose_exact_scale,
    choose_input_side,
    padded_rank,
)
from prodial_kernels.kernels.projector.gemm import MAX_ADDED_RANK, launch_gemm
from prodial_kernels.kernels.projector.input_side import InputSums, launch_input_sums
from prodial_kernels.kernels.projector.low_rank import (
    launch_low_rank_parts,
    launch_low_rank_sum,
    low_rank_parts,
)
from prodial_kernels.kernels.projector.operands import (
    Gradients,
    Kept,
    Needs,
    Operands,
    ProjectionOptions,
)
from prodial_kernels.kernels.projector.output_side import OutputSums, launch_output_sums
from prodial_kernels.kernels.projector.pdl import supports_pdl
from prodial_kernels.kernels.projector.prepare import (
    Prepared,
    launch_low_rank,
    launch_prepare,
    launch_scaled,
)
from prodial_kernels.kernels.projector.reduce import launch_reduce
from prodial_kernels.kernels.projector.tiles import (
    block_size_of,
    diagonal_of,
    tma_ready,
    token_shape,
)
from prodial_kernels.kernels.projector.weight_side import launch_weight_side
from prodial_kernels.kernels.replay.recorder import fork, join


def forward(
    x: Tensor,
    operands: Operands,
    options: ProjectionOptions,
    length: int = 0,
    made: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return Y and H [M, R_PAD] (None without LoRA) for X, [M, K] or channel-first [b, K, l].

    Y is channel-first [M / length, N, length] where a ``length`` is given, else [M, N]. ``made``: H
    and α B, [N, R_PAD], of a rank that only the product holds; then there is neither A nor B.
    """
    weight, blocks, scale_deviation, lora_a, lora_b, bias, seed = operands
    m, (n, k) = token_shape(x)[0], weight.shape
    r_pad = 16 if lora_a is None else padded_rank(lora_a.shape[0])
    limits = device_limits(x.device)
    plan = choose_forward(
        m, n, k, r_pad=None if lora_a is None else r_pad,
        block_size=None if blocks is None else block_size_of(blocks),
        scale=scale_deviation is not None, dropout=seed is not None,
        x_channel_first=x.ndim == 3, y_channel_first=length > 0,
        aligned=_aligned(x, weight), limits=limits,
    )  # fmt: skip
    pdl = plan.gemm.pdl and supports_pdl(limits.capability, x)
    config = replace(plan.gemm, pdl=pdl)
    y = x.new_empty((m // length if length else 0, n, length) if length else (m, n))
    h, factor = (None, None) if made is None else made
    for first, columns in plan.panels:
        fused = plan.fused_low_rank and first == 0
        separate = lora_a is not None and not plan.fused_low_rank and h is None
        panel = Operands(
            weight.narrow(0, first, columns), blocks, _part(scale_deviation, first, columns),
            lora_a if fused or separate else None, _part(lora_b, first, columns), None, seed,
        )  # fmt: skip
        if plan.low_rank is not None and separate and lora_a is not None:
            v, a, b, low = _prepare_by_parts(
                x, lora_a, panel, options, plan, r_pad, triggers_next=pdl
            )
        else:
            v, a, b, low = launch_prepare(
                panel, options, r_pad=r_pad, low_rank_of=x if separate else None,
                activations=x if plan.on_activations else None, triggers_next=pdl,
            )  # fmt: skip
        h = low if separate else h
        b = b if factor is None else _part(factor, first, columns)
        u, v = (v, weight) if plan.on_activations else (x, v)
        panel_config, tail = config, 0
        if first + columns == n:
            tail = plan.tail_columns
            panel_config = config if plan.rest is None else replace(plan.rest, pdl=pdl)
        side = fork(x.device) if tail and x.is_cuda else None
        for at, size, tiles, stream in (
            (0, columns - tail, panel_config, None), (columns - tail, tail, NARROW, side),
        ):  # fmt: skip
            if not size:
                continue
            h = launch_gemm(
                u, v.narrow(0, at, size), y.narrow(1, first + at, size), v_transposed=True,
                config=tiles, inner=a, outer=_part(b, at, size), low=None if fused else h,
                scale_deviation=_part(scale_deviation, at, size) if plan.on_activations else None,
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
    (m, n), k = token_shape(dy), token_shape(x)[1]
    parts = (x, *operands[:-1])
    needs = Needs(*(need and part is not None for need, part in zip(needs, parts, strict=True)))
    if m == 0:
        return Gradients(
            *(torch.zeros_like(part) if part is not None and need else None
              for part, need in zip(parts, needs, strict=True))
        )  # fmt: skip
    gradients = new_gradients(operands, needs)
    # B may come alone: then H is given for its gradient and that of s, and A is the caller's.
    r_pad = 16 if lora_b is None else padded_rank(lora_b.shape[1])
    limits = device_limits(dy.device)
    through_weight = needs.x or needs.blocks
    wants_t = lora_a is not None and lora_b is not None and (needs.x or needs.lora_a)
    scales: Literal["nothing", "weight", "either"] = "nothing"
    if scale_deviation is not None and kept.scaled is None:
        scales = "either" if dy.ndim == 2 else "weight"
    plan = choose_backward(
        m, n, k, r_pad, wants_t=wants_t, output_side=needs.lora_b or needs.scale or needs.bias,
        through_weight=through_weight, bias=bias is not None, channel_first=x.ndim == 3,
        limits=limits, scales=scales,
    )  # fmt: skip
    pdl = supports_pdl(limits.capability, dy)
    product = replace(plan.gemm, pdl=pdl and plan.gemm.pdl)
    co_resident = plan.co_resident and through_weight

    # Beside the product, or in turn.
    sum_outputs = partial(
        launch_output_sums, dy, x, operands, kept, options, needs, config=plan.output_side,
        exact=choose_exact_scale(
            limits.capability, block_size=block_size_of(blocks), even=_even(dy, x, weight),
            co_resident=plan.co_resident,
        ),
    )  # fmt: skip
    side = fork(dy.device) if plan.side_processors and dy.is_cuda else None
    outputs = OutputSums()
    t: Tensor | None = None
    du: Tensor | None = None
    sw: Tensor | None = None
    if not co_resident:
        outputs = sum_outputs(side=side)
    t_parts: Tensor | None = None
    if plan.low_rank is not None and lora_b is not None and dy.ndim == 2:
        t_parts = low_rank_parts(dy, r_pad, plan.low_rank)
        if not plan.token_parts:
            launch_low_rank_parts(
                dy, lora_b, t_parts, options, config=plan.low_rank, transposed=False, side=side
            )
            t = launch_low_rank_sum(t_parts, dy.dtype, options, side=side).low
    elif wants_t and not plan.fused_low_rank and lora_b is not None:
        t = launch_low_rank(dy, lora_b, options, r_pad, side)
    if plan.token_parts and scale_deviation is not None:
        du = dy.new_empty(x.shape)
        for first, tokens in plan.token_parts:
            sw = None  # what is made next takes its place
            rows = dy.narrow(0, first, tokens)
            sw = _unwritten_rows(du, first + tokens, rows)
            if t_parts is not None and plan.low_rank is not None and lora_b is not None:
                launch_low_rank_parts(
                    rows, lora_b, t_parts.narrow(1, first, tokens), options, config=plan.low_rank,
                    transposed=False, scaled=sw, deviation=scale_deviation,
                    triggers_next=product.pdl,
                )  # fmt: skip
            else:
                launch_scaled(rows, scale_deviation, sw, triggers_next=product.pdl)
            if co_resident and first == 0 and dy.is_cuda:
                side = fork(dy.device)
            tiles = product if plan.rest is None or first + tokens < m else plan.rest
            launch_gemm(sw, weight, du.narrow(0, first, tokens), v_transposed=False, config=tiles)
            if co_resident and first == 0:
                outputs = sum_outputs(side=side)
        if t_parts is not None:
            t = launch_low_rank_sum(t_parts, dy.dtype, options).low
    elif through_weight:
        du = dy.new_empty(x.shape)
        source, folded = weight, scale_deviation
        if kept.scaled is not None:
            source, folded = kept.scaled, None
        for first, columns in plan.panels:
            fused = plan.fused_low_rank and first == 0
            sw = None  # what is made next takes its place
            sw, _, b, _ = launch_prepare(
                Operands(
                    source.narrow(1, first, columns), scale_deviation=folded,
                    lora_b=lora_b if fused else None,
                ),
                options, r_pad=r_pad, b_transposed=True, triggers_next=product.pdl,
            )  # fmt: skip
            if co_resident and first == 0 and dy.is_cuda:
                side = fork(dy.device)
            last = first + columns == k
            low = launch_gemm(
                dy, sw, du.narrow(1, first, columns), v_transposed=False,
                config=product if plan.rest is None or not last else plan.rest,
                inner=b, length=x.shape[2] if x.ndim == 3 else 0,
            )  # fmt: skip
            t = low if fused else t
            if co_resident and first == 0:
                # After it, whose programs find each a multiprocessor of its own only if first.
                outputs = sum_outputs(side=side)
    # The input side needs T; with that at hand, it need not wait for the output side.
    deferred = side is not None and plan.deferred and (t is None or plan.fused_low_rank)
    if side is not None and not deferred:
        join(side, dy.device)
    # Not before: what the side stream writes must not take its place while the product reads it.
    del sw
    config = choose_input_side(
        m, k, r_pad, block_size_of(blocks), dropout=seed is not None,
        channel_first=x.ndim == 3, capability=limits.capability,
    )  # fmt: skip
    inputs = launch_input_sums(du, x, t, operands, options, needs, config=config, triggers_next=pdl)
    if side is not None and deferred:
        join(side, dy.device)
    launch_reduce(
        outputs, inputs, gradients, operands, options,
        pdl=pdl and inputs.launched and not deferred,
    )  # fmt: skip
    return gradients._replace(x=du if needs.x else None)


def _unwritten_rows(du: Tensor, first: int, like: Tensor) -> Tensor:
    """A matrix like ``like`` in the rows of dU from ``first`` on, or new where those are too few.

    Nothing but the products of later parts writes there, after that of this one.
    """
    rows = du.narrow(0, first, du.shape[0] - first).view(-1)
    if rows.numel() < like.numel() or not tma_ready(rows):
        return like.new_empty(like.shape)
    return rows.narrow(0, 0, like.numel()).view(like.shape)


def _prepare_by_parts(
    x: Tensor,
    lora_a: Tensor,
    operands: Operands,
    options: ProjectionOptions,
    plan: ForwardPlan,
    r_pad: int,
    *,
    triggers_next: bool,
) -> Prepared:
    """As :func:`launch_prepare`, with H from parts of its sums, for X [M, K].

    U of blocks of 1 is made in the read of X that makes the parts.
    """
    if plan.low_rank is None:
        raise ValueError("plan: expected tile sizes for the parts of H, got None")
    blocks, lora_b = operands.blocks, operands.lora_b
    parts = low_rank_parts(x, r_pad, plan.low_rank)
    job = partial(
        launch_low_rank_parts, x, lora_a, parts, options, config=plan.low_rank, transposed=True
    )
    if plan.on_activations and block_size_of(blocks) == 1:
        u = x
        if blocks is None:
            job()
        else:
            u = x.new_empty(x.shape)
            job(scaled=u, deviation=blocks, diagonal=diagonal_of(blocks, options))
        h, b = launch_low_rank_sum(
            parts, x.dtype, options, lora_b=lora_b, triggers_next=triggers_next
        )
        return Prepared(u, None, b, h)
    job()
    h = launch_low_rank_sum(parts, x.dtype, options).low
    v, _, b, _ = launch_prepare(
        operands._replace(lora_a=None), options, r_pad=r_pad,
        activations=x if plan.on_activations else None, triggers_next=triggers_next,
    )  # fmt: skip
    return Prepared(v, None, b, h)


def scaled_weight(weight: Tensor, scale_deviation: Tensor) -> tuple[Tensor]:
    """Return s ⊙ W, [N, K], as :func:`backward` makes it."""
    operands = Operands(weight, scale_deviation=scale_deviation)
    return (launch_prepare(operands, ProjectionOptions("triton"), r_pad=16).v,)


def weight_sums(
    f: Tensor, operands: Operands, options: ProjectionOptions, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """Return ds and dD_a, those asked for, from F = dYᵀ X [N, K]."""
    needs = needs._replace(
        scale=needs.scale and operands.scale_deviation is not None,
        blocks=needs.blocks and operands.blocks is not None,
    )
    if not (needs.scale or needs.blocks):
        return None, None
    # The other gradients are the caller's.
    operands = operands._replace(lora_a=None, lora_b=None, bias=None)
    gradients = new_gradients(operands, needs)
    needs = needs._replace(lora_a=False, lora_b=False, bias=False)
    sums = launch_weight_side(f, operands, options, needs)
    launch_reduce(
        OutputSums(scale=sums.scale), InputSums(blocks=sums.blocks), gradients, operands, options
    )
    return gradients.scale, gradients.blocks


def new_gradients(operands: Operands, needs: Needs) -> Gradients:
    """Uninitialised gradients of the operands for which they are asked; not of X and W."""
    return Gradients(
        None, None,
        *(torch.empty_like(part) if part is not None and need else None
          for part, need in zip(operands[1:-1], needs[2:], strict=True))
    )  # fmt: skip


def _even(*matrices: Tensor) -> bool:
    """Whether the rows of all are tokens, and begin at multiples of 16 elements."""
    return all(matrix.ndim == 2 and matrix.stride(0) % 16 == 0 for matrix in matrices)


def _part(rows: Tensor | None, first: int, size: int) -> Tensor | None:
    return None if rows is None else rows.narrow(0, first, size)


def _aligned(x: Tensor, weight: Tensor) -> bool:
    """Whether the copy engine can load X, W and all that is made of them."""
    return all(size % 8 == 0 for size in weight.shape) and tma_ready(x) and tma_ready(weight)


def adds_wide(x: Tensor, weight: Tensor, r_pad: int) -> bool:
    """Whether forward adds a ready H of this rank to Y within the product; see ``made`` there."""
    hopper = device_limits(x.device).capability[0] == 9
    return hopper and r_pad <= MAX_ADDED_RANK and _aligned(x, weight)


# The same of flat operands, as the recording of launches takes them.


def recorded_forward(x: Tensor, *operands_options_length: Any) -> tuple[Tensor, Tensor | None]:
    """:func:`forward` of X, the fields of ``Operands``, the options and the length."""
    *operands, options, length = operands_options_length
    return forward(x, Operands(*operands), options, length)


def recorded_wide_forward(x: Tensor, *operands_made_options_length: Any) -> tuple[Tensor]:
    """:func:`forward` of X, the fields of ``Operands``, H and α B as ``made``, and so on: Y."""
    *operands, h, b, options, length = operands_made_options_length
    return (forward(x, Operands(*operands), options, length, (h, b))[0],)


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


@lru_cache
def device_limits(device: torch.device) -> DeviceLimits:
    """Of the device; of a Hopper under the interpreter."""
    if device.type != "cuda":
        return DeviceLimits((9, 0), 4)
    properties = torch.cuda.get_device_properties(device)
    return DeviceLimits((properties.major, properties.minor), properties.multi_processor_count)
