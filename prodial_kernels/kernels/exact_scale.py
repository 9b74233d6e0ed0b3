"""The scale's gradient where the division form is not sound, computed anew."""

import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.launch import ceil_div
from prodial_kernels.kernels.tiles import load_deviation


@triton.jit
def _exact_scale_kernel(
    dy_ptr, x_ptr, w_ptr, blocks_ptr, partial_scale_ptr,
    M, N, K,
    stride_dy, stride_x, stride_w, rows_per_split,
    P: tl.constexpr, RELU: tl.constexpr, HAS_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """ds_part = rowsum((dYᵀ X) ⊙ (W D_b)) = Σ_m dY ⊙ (X (W D_b)ᵀ), where ds_part is NaN.

    dY [M, N], X [M, K], W [N, K], D_a [K / P, P, P], ds_part [splits, N].
    One program owns BLOCK_N columns of one split of the tokens, and leaves at once where
    nothing is asked for, which is nearly always.
    """
    SPAN: tl.constexpr = (WINDOW // P) * P
    split = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    part = partial_scale_ptr + split.to(tl.int64) * N + offs_n
    ds = tl.load(part, mask=mask_n, other=0.0)
    asked = ds != ds
    if tl.sum(tl.where(asked, 1, 0), 0) > 0:
        start = split * rows_per_split
        stop = tl.minimum(start + rows_per_split, M)
        lane = tl.arange(0, WINDOW)
        total = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for k in range(0, K, SPAN):
            offs_k = k + lane
            mask_k = (lane < SPAN) & (offs_k < K)
            acc = tl.zeros((BLOCK_N, WINDOW), dtype=tl.float32)
            for m in range(start, stop, BLOCK_M):
                offs_m = m + tl.arange(0, BLOCK_M)
                mask_m = (offs_m < stop)[:, None]
                rows = offs_m.to(tl.int64)[:, None]
                dy = tl.load(
                    dy_ptr + rows * stride_dy + offs_n[None, :],
                    mask=mask_m & mask_n[None, :], other=0.0,
                )  # fmt: skip
                x = tl.load(
                    x_ptr + rows * stride_x + offs_k[None, :],
                    mask=mask_m & mask_k[None, :], other=0.0,
                )  # fmt: skip
                # [BLOCK_N, BLOCK_M] @ [BLOCK_M, WINDOW] -> [BLOCK_N, WINDOW]
                acc = tl.dot(dy.T, x, acc)
            w = tl.load(
                w_ptr + offs_n.to(tl.int64)[:, None] * stride_w + offs_k[None, :],
                mask=mask_n[:, None] & mask_k[None, :], other=0.0,
            )  # fmt: skip
            wd = w.to(tl.float32)
            if HAS_BLOCKS:
                if P == 1:
                    wd *= 1 + load_deviation(blocks_ptr, offs_k, offs_k, K, P, RELU)[None, :]
                else:
                    e = load_deviation(blocks_ptr, offs_k[:, None], offs_k[None, :], K, P, RELU)
                    # [BLOCK_N, WINDOW] @ [WINDOW, WINDOW] -> [BLOCK_N, WINDOW]
                    wd += tl.dot(w, e.to(w.dtype))
            total += tl.sum(acc * wd, 1)
        tl.store(part, tl.where(asked, total, ds), mask=mask_n)


def launch_exact_scale(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    blocks: Tensor | None,
    partial_scale: Tensor,
    rows_per_split: int,
    relu: bool,
) -> None:
    """Fill the NaN entries of ``partial_scale`` [S, N] in place."""
    n, k = weight.shape
    p = 1 if blocks is None else blocks.shape[-1]
    block_n = 64
    _exact_scale_kernel[(ceil_div(n, block_n), partial_scale.shape[0])](
        dy, x, weight, blocks, partial_scale,
        dy.shape[0], n, k,
        dy.stride(0), x.stride(0), weight.stride(0), rows_per_split,
        P=p, RELU=relu, HAS_BLOCKS=blocks is not None,
        BLOCK_M=64, BLOCK_N=block_n, WINDOW=max(64, triton.next_power_of_2(p)),
        num_warps=4, num_stages=3,
    )  # fmt: skip
