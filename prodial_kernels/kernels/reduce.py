"""From partial sums to gradients: the second stage of the deterministic reductions."""

import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.launch import ceil_div

ROWS = 16


@triton.jit
def _reduce_kernel(
    partial_b_ptr, partial_scale_ptr, partial_bias_ptr, partial_a_ptr, partial_e_ptr,
    blocks_ptr,
    db_ptr, dscale_ptr, dbias_ptr, da_ptr, dblocks_ptr,
    N, K, R, splits_n, splits_k, programs_n, alpha,
    P: tl.constexpr, RELU: tl.constexpr,
    NEED_B: tl.constexpr, NEED_SCALE: tl.constexpr, NEED_BIAS: tl.constexpr,
    NEED_A: tl.constexpr, NEED_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, R_PAD: tl.constexpr,
):  # fmt: skip
    """dB = α Σ dB_part, ds = Σ ds_part, dbias = Σ dbias_part, dA = Σ dA_partᵀ, dD_a = ± Σ dE_part.

    dB [N, R], ds, dbias [N] over splits_n parts; dA [R, K], dD_a [K / P, P, P] seen as [K, P] over
    splits_k parts, negated on the diagonal where RELU keeps it; parts as the first stage leaves
    them. The first programs_n programs own ROWS rows n each, the others ROWS rows k each.
    """
    pid = tl.program_id(0)
    offs_r = tl.arange(0, R_PAD)
    if pid < programs_n:
        offs_n = pid * ROWS + tl.arange(0, ROWS)
        mask_n = offs_n < N
        if NEED_B:
            inside = mask_n[:, None] & (offs_r < R)[None, :]
            part = partial_b_ptr + offs_n.to(tl.int64)[:, None] * R_PAD + offs_r[None, :]
            db = _sum_parts(part, inside, splits_n, N * R_PAD) * alpha
            target = db_ptr + offs_n.to(tl.int64)[:, None] * R + offs_r[None, :]
            tl.store(target, db.to(db_ptr.dtype.element_ty), mask=inside)
        if NEED_SCALE:
            ds = _sum_parts(partial_scale_ptr + offs_n, mask_n, splits_n, N)
            tl.store(dscale_ptr + offs_n, ds.to(dscale_ptr.dtype.element_ty), mask=mask_n)
        if NEED_BIAS:
            dbias = _sum_parts(partial_bias_ptr + offs_n, mask_n, splits_n, N)
            tl.store(dbias_ptr + offs_n, dbias.to(dbias_ptr.dtype.element_ty), mask=mask_n)
    else:
        offs_k = (pid - programs_n) * ROWS + tl.arange(0, ROWS)
        mask_k = offs_k < K
        if NEED_A:
            inside = mask_k[:, None] & (offs_r < R)[None, :]
            part = partial_a_ptr + offs_k.to(tl.int64)[:, None] * R_PAD + offs_r[None, :]
            da = _sum_parts(part, inside, splits_k, K * R_PAD)
            target = da_ptr + offs_r.to(tl.int64)[None, :] * K + offs_k[:, None]
            tl.store(target, da.to(da_ptr.dtype.element_ty), mask=inside)
        if NEED_BLOCKS:
            offs_p = tl.arange(0, BLOCK_P)
            inside = mask_k[:, None] & (offs_p < P)[None, :]
            flat = offs_k.to(tl.int64)[:, None] * P + offs_p[None, :]
            de = _sum_parts(partial_e_ptr + flat, inside, splits_k, K * P)
            if RELU:
                a = tl.load(blocks_ptr + flat, mask=inside, other=0.0).to(tl.float32)
                # The subgradient at 0 is 1, so that a diagonal that starts at 0 trains.
                on_diagonal = (offs_k % P)[:, None] == offs_p[None, :]
                de = tl.where(on_diagonal, tl.where(a < 0, 0.0, -de), de)
            tl.store(dblocks_ptr + flat, de.to(dblocks_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_parts(part, inside, splits, stride):
    """Sum ``splits`` tiles that lie ``stride`` elements apart, in order."""
    total = tl.load(part, mask=inside, other=0.0)
    for _ in range(1, splits):
        part += stride
        total += tl.load(part, mask=inside, other=0.0)
    return total


def launch_reduce(
    partial_b: Tensor | None,
    partial_scale: Tensor | None,
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
) -> None:
    """Write the gradients that are given, each from its parts [splits, ...]."""
    outputs = [part for part in (partial_b, partial_scale, partial_bias) if part is not None]
    inputs = [part for part in (partial_a, partial_e) if part is not None]
    if not outputs and not inputs:
        return
    p = 1 if blocks is None else blocks.shape[-1]
    programs_n = ceil_div(n, ROWS) if outputs else 0
    programs_k = ceil_div(k, ROWS) if inputs else 0
    _reduce_kernel[(programs_n + programs_k,)](
        partial_b, partial_scale, partial_bias, partial_a, partial_e,
        blocks,
        db, dscale, dbias, da, dblocks,
        n, k, r,
        outputs[0].shape[0] if outputs else 0, inputs[0].shape[0] if inputs else 0,
        programs_n, alpha,
        P=p, RELU=relu,
        NEED_B=partial_b is not None, NEED_SCALE=partial_scale is not None,
        NEED_BIAS=partial_bias is not None, NEED_A=partial_a is not None,
        NEED_BLOCKS=partial_e is not None,
        ROWS=ROWS, BLOCK_P=triton.next_power_of_2(p), R_PAD=r_pad,
        num_warps=2,
    )  # fmt: skip
