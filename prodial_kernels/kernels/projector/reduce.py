"""From partial sums to gradients: the second stage of the deterministic reductions."""

import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import ceil_div
from prodial_kernels.kernels.projector.early_launch import launched_early, wait_for_results
from prodial_kernels.kernels.projector.tiles import block_size_of
from prodial_kernels.kernels.replay.recorder import launch

# Elements one program sums, and parts it loads at once to hide the memory's latency.
BLOCK, PARTS = 256, 16


@triton.jit
def _reduce_kernel(
    partial_b_ptr, partial_scale_ptr, exact_ptr, partial_bias_ptr, partial_a_ptr, partial_e_ptr,
    blocks_ptr,
    db_ptr, dscale_ptr, dbias_ptr, da_ptr, dblocks_ptr,
    N, K, R, splits_n, splits_k, spans, end_b, end_n, end_a, alpha,
    P: tl.constexpr, RELU: tl.constexpr,
    NEED_B: tl.constexpr, NEED_SCALE: tl.constexpr, NEED_BIAS: tl.constexpr,
    NEED_A: tl.constexpr, NEED_BLOCKS: tl.constexpr, HAS_EXACT: tl.constexpr,
    R_PAD: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """dB = α Σ dB_part, ds = Σ ds_part, dbias = Σ dbias_part, dA = Σ dA_part, dD_a = ± Σ dE_part.

    dB [N, R], ds, dbias [N] over splits_n parts; dA [R, K], dD_a [K / P, P, P] over splits_k parts,
    negated on the diagonal where RELU keeps it; parts as the first stage leaves them. Where
    Σ ds_part is NaN and HAS_EXACT, ds is Σ exact, [spans, N].
    A program owns BLOCK elements: of dB below end_b, of ds and dbias below end_n, of dA below
    end_a, of dD_a from there on. EARLY: begun before the launch before has ended.
    """
    if EARLY:
        wait_for_results()
    pid = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if pid < end_b:
        if NEED_B:
            offs = pid * BLOCK + lane
            n, r = offs // R_PAD, offs % R_PAD
            db = _sum_parts(partial_b_ptr, offs, splits_n, N * R_PAD, BLOCK, PARTS) * alpha
            inside = (n < N) & (r < R)
            tl.store(db_ptr + n * R + r, db.to(db_ptr.dtype.element_ty), mask=inside)
    elif pid < end_n:
        offs_n = (pid - end_b) * BLOCK + lane
        if NEED_SCALE:
            ds = _sum_parts(partial_scale_ptr, offs_n, splits_n, N, BLOCK, PARTS)
            if HAS_EXACT:
                asked = ds != ds
                if tl.max(tl.where(asked, 1, 0), 0) > 0:
                    exact = _sum_parts(exact_ptr, offs_n, spans, N, BLOCK, PARTS)
                    ds = tl.where(asked, exact, ds)
            tl.store(dscale_ptr + offs_n, ds.to(dscale_ptr.dtype.element_ty), mask=offs_n < N)
        if NEED_BIAS:
            dbias = _sum_parts(partial_bias_ptr, offs_n, splits_n, N, BLOCK, PARTS)
            tl.store(dbias_ptr + offs_n, dbias.to(dbias_ptr.dtype.element_ty), mask=offs_n < N)
    elif pid < end_a:
        if NEED_A:
            offs_a = (pid - end_n) * BLOCK + lane
            da = _sum_parts(partial_a_ptr, offs_a, splits_k, K * R_PAD, BLOCK, PARTS)
            tl.store(da_ptr + offs_a, da.to(da_ptr.dtype.element_ty), mask=offs_a < R * K)
    else:
        if NEED_BLOCKS:
            offs_e = (pid - end_a) * BLOCK + lane
            de = _sum_parts(partial_e_ptr, offs_e, splits_k, K * P, BLOCK, PARTS)
            if RELU:
                a = tl.load(blocks_ptr + offs_e, mask=offs_e < K * P, other=0.0).to(tl.float32)
                # The subgradient at 0 is 1, so that a diagonal that starts at 0 trains.
                on_diagonal = (offs_e // P) % P == offs_e % P
                de = tl.where(on_diagonal, tl.where(a < 0, 0.0, -de), de)
            tl.store(dblocks_ptr + offs_e, de.to(dblocks_ptr.dtype.element_ty), mask=offs_e < K * P)


@triton.jit
def _sum_parts(
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


def launch_reduce(
    partial_b: Tensor | None,
    partial_scale: Tensor | None,
    exact: Tensor | None,
    partial_bias: Tensor | None,
    partial_a: Tensor | None,
    partial_e: Tensor | None,
    *,
    blocks: Tensor | None,
    db: Tensor | None,
    dscale: Tensor | None,
    dbias: Tensor | None,
    da: Tensor | None,
    dblocks: Tensor | None,
    n: int,
    k: int,
    r: int,
    r_pad: int,
    alpha: float,
    relu: bool,
    early: bool = False,
) -> None:
    """Write the gradients that are given, each from its parts [splits, ...].

    ``early`` begins before the launch before has ended, which opens the way.
    """
    outputs = [part for part in (partial_b, partial_scale, partial_bias) if part is not None]
    inputs = [part for part in (partial_a, partial_e) if part is not None]
    p = block_size_of(blocks)
    end_b = ceil_div(n * r_pad, BLOCK) if partial_b is not None else 0
    has_columns = partial_scale is not None or partial_bias is not None
    end_n = end_b + (ceil_div(n, BLOCK) if has_columns else 0)
    end_a = end_n + (ceil_div(k * r, BLOCK) if partial_a is not None else 0)
    end = end_a + (ceil_div(k * p, BLOCK) if partial_e is not None else 0)
    if end == 0:
        return
    launch(
        _reduce_kernel, (end,),
        partial_b, partial_scale, exact, partial_bias, partial_a, partial_e,
        blocks,
        db, dscale, dbias, da, dblocks,
        n, k, r,
        outputs[0].shape[0] if outputs else 0, inputs[0].shape[0] if inputs else 0,
        0 if exact is None else exact.shape[0], end_b, end_n, end_a, alpha,
        P=p, RELU=relu,
        NEED_B=partial_b is not None, NEED_SCALE=partial_scale is not None,
        NEED_BIAS=partial_bias is not None, NEED_A=partial_a is not None,
        NEED_BLOCKS=partial_e is not None, HAS_EXACT=exact is not None,
        R_PAD=r_pad, BLOCK=BLOCK, PARTS=PARTS, EARLY=early,
        num_warps=4, **launched_early(early),
    )  # fmt: skip
