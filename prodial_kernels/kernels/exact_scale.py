"""The scale's gradient where the division form is not sound, computed anew."""

import triton
import triton.language as tl

from prodial_kernels.kernels.tiles import load_deviation


@triton.jit
def exact_scale(
    dy_ptr, x_ptr, w_ptr, blocks_ptr, offs_n, start, stop,
    N, K, stride_dy, stride_x, stride_w,
    P: tl.constexpr, RELU: tl.constexpr, HAS_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """ds = rowsum((dYᵀ X) ⊙ (W D_b)) = Σ_m dY ⊙ (X (W D_b)ᵀ) over the tokens start ≤ m < stop.

    dY [M, N], X [M, K], W [N, K], D_a [K / P, P, P]; offs_n [BLOCK_N] -> ds [BLOCK_N].
    """
    SPAN: tl.constexpr = (WINDOW // P) * P
    mask_n = offs_n < N
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
    return total
