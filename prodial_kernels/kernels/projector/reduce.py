"""From partial sums to gradients: the second stage of the deterministic reductions."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import ceil_div
from prodial_kernels.kernels.choices.tile_sizes import padded_rank
from prodial_kernels.kernels.projector.input_side import InputSums
from prodial_kernels.kernels.projector.operands import Gradients, Operands, ProjectionOptions
from prodial_kernels.kernels.projector.output_side import OutputSums
from prodial_kernels.kernels.projector.pdl import pdl_options, wait_for_previous
from prodial_kernels.kernels.projector.tiles import diagonal_of
from prodial_kernels.kernels.replay.recorder import launch

# Elements one program sums, and parts it loads at once to hide the memory's latency.
BLOCK, PARTS = 256, 16
# The same where there are more parts than MANY, of which a program would wait for one load after
# another: 2 µs of a step's 80 at 84 parts (H200).
FEW_ELEMENTS, MANY_PARTS, MANY = 64, 64, 64


class ReduceTile(NamedTuple):
    """Compile-time constants of ``_reduce_kernel``.

    Attributes:
        rank: R_PAD, the padded rank.
        block: Elements that a program owns.
        parts: Parts that it loads at once.
        pdl: Whether it is launched while the launch before drains.
    """

    rank: int
    block: int
    parts: int
    pdl: bool


@triton.jit
def _reduce_kernel(
    partial_b_ptr, partial_scale_ptr, exact_ptr, partial_bias_ptr, partial_a_ptr, partial_e_ptr,
    blocks_ptr,
    db_ptr, dscale_ptr, dbias_ptr, da_ptr, dblocks_ptr,
    N, K, R, splits_n, splits_k, shares, end_b, end_n, end_a, alpha,
    DIAGONAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dB = α Σ dB_part, ds = Σ ds_part, dbias = Σ dbias_part, dA = Σ dA_part, dD_a = ± Σ dE_part.

    dB [N, R], ds, dbias [N] over splits_n parts; dA [R, K], dD_a [K / P, P, P] over splits_k parts,
    negated on the diagonal where relu keeps it; parts as the first stage leaves them, None for
    those that are not asked for. Where Σ ds_part is NaN and ``exact`` given, ds is Σ exact,
    [shares, N].
    A program owns BLOCK elements: of dB below end_b, of ds and dbias below end_n, of dA below
    end_a, of dD_a from there on.
    """
    if TILE.pdl:
        wait_for_previous()
    P: tl.constexpr = DIAGONAL.p
    R_PAD: tl.constexpr = TILE.rank
    BLOCK: tl.constexpr = TILE.block
    PARTS: tl.constexpr = TILE.parts
    pid = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if pid < end_b:
        if partial_b_ptr is not None:
            offs = pid * BLOCK + lane
            n, r = offs // R_PAD, offs % R_PAD
            db = sum_parts(partial_b_ptr, offs, splits_n, N * R_PAD, BLOCK, PARTS) * alpha
            inside = (n < N) & (r < R)
            tl.store(db_ptr + n * R + r, db.to(db_ptr.dtype.element_ty), mask=inside)
    elif pid < end_n:
        offs_n = (pid - end_b) * BLOCK + lane
        if partial_scale_ptr is not None:
            ds = sum_parts(partial_scale_ptr, offs_n, splits_n, N, BLOCK, PARTS)
            if exact_ptr is not None:
                asked = ds != ds
                if tl.max(tl.where(asked, 1, 0), 0) > 0:
                    exact = sum_parts(exact_ptr, offs_n, shares, N, BLOCK, PARTS)
                    ds = tl.where(asked, exact, ds)
            tl.store(dscale_ptr + offs_n, ds.to(dscale_ptr.dtype.element_ty), mask=offs_n < N)
        if partial_bias_ptr is not None:
            dbias = sum_parts(partial_bias_ptr, offs_n, splits_n, N, BLOCK, PARTS)
            tl.store(dbias_ptr + offs_n, dbias.to(dbias_ptr.dtype.element_ty), mask=offs_n < N)
    elif pid < end_a:
        if partial_a_ptr is not None:
            offs_a = (pid - end_n) * BLOCK + lane
            da = sum_parts(partial_a_ptr, offs_a, splits_k, K * R_PAD, BLOCK, PARTS)
            tl.store(da_ptr + offs_a, da.to(da_ptr.dtype.element_ty), mask=offs_a < R * K)
    else:
        if partial_e_ptr is not None:
            offs_e = (pid - end_a) * BLOCK + lane
            de = sum_parts(partial_e_ptr, offs_e, splits_k, K * P, BLOCK, PARTS)
            if DIAGONAL.relu:
                a = tl.load(blocks_ptr + offs_e, mask=offs_e < K * P, other=0.0).to(tl.float32)
                # The subgradient at 0 is 1, so that a diagonal that starts at 0 trains.
                on_diagonal = (offs_e // P) % P == offs_e % P
                de = tl.where(on_diagonal, tl.where(a < 0, 0.0, -de), de)
            tl.store(dblocks_ptr + offs_e, de.to(dblocks_ptr.dtype.element_ty), mask=offs_e < K * P)


@triton.jit
def sum_parts(
    part_ptr, offs, splits, length, BLOCK: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Σ over the rows of a [splits, length] matrix, for the columns ``offs``, in a fixed order."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, splits, PARTS):
        split = first + tl.arange(0, PARTS)
        inside = (split < splits)[:, None] & (offs < length)[None, :]
        source = part_ptr + split.to(tl.int64)[:, None] * length + offs[None, :]
        total += tl.sum(tl.load(source, mask=inside, other=0.0), 0)
    return total


def _splits(*parts: Tensor | None) -> int:
    """Of those that are given, which all have as many; 0 where none is."""
    return next((part.shape[0] for part in parts if part is not None), 0)


def launch_reduce(
    outputs: OutputSums,
    inputs: InputSums,
    gradients: Gradients,
    operands: Operands,
    options: ProjectionOptions,
    *,
    pdl: bool = False,
) -> None:
    """Write the gradients that are given, each from its parts [splits, ...].

    ``pdl`` starts it while the launch before drains, which must trigger it.
    """
    n, k = operands.weight.shape
    r = 0 if operands.lora_b is None else operands.lora_b.shape[1]
    r_pad = padded_rank(r)
    diagonal = diagonal_of(operands.blocks, options)
    splits_n = _splits(outputs.b, outputs.scale, outputs.bias)
    splits_k = _splits(inputs.a, inputs.blocks)
    many = max(splits_n, splits_k) > MANY
    block, parts = (FEW_ELEMENTS, MANY_PARTS) if many else (BLOCK, PARTS)
    end_b = ceil_div(n * r_pad, block) if outputs.b is not None else 0
    has_columns = outputs.scale is not None or outputs.bias is not None
    end_n = end_b + (ceil_div(n, block) if has_columns else 0)
    end_a = end_n + (ceil_div(k * r, block) if inputs.a is not None else 0)
    end = end_a + (ceil_div(k * diagonal.p, block) if inputs.blocks is not None else 0)
    if end == 0:
        return
    launch(
        _reduce_kernel, (end,),
        partial_b_ptr=outputs.b, partial_scale_ptr=outputs.scale, exact_ptr=outputs.exact,
        partial_bias_ptr=outputs.bias, partial_a_ptr=inputs.a, partial_e_ptr=inputs.blocks,
        blocks_ptr=operands.blocks,
        db_ptr=gradients.lora_b, dscale_ptr=gradients.scale, dbias_ptr=gradients.bias,
        da_ptr=gradients.lora_a, dblocks_ptr=gradients.blocks,
        N=n, K=k, R=r,
        splits_n=splits_n, splits_k=splits_k, shares=_splits(outputs.exact),
        end_b=end_b, end_n=end_n, end_a=end_a, alpha=options.lora_scaling,
        DIAGONAL=diagonal, TILE=ReduceTile(r_pad, block, parts, pdl),
        num_warps=4, **pdl_options(pdl),
    )  # fmt: skip
