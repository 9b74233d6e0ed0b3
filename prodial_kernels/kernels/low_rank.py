"""The skinny product L = dropout(X) I, one read of X."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.tiles import dropout_keep


@triton.jit
def _low_rank_kernel(
    x_ptr, inner_ptr, seed_ptr, low_ptr,
    M, K,
    stride_x, dropout,
    TRANSPOSED: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, R_PAD: tl.constexpr,
):  # fmt: skip
    """L = dropout(X) I.

    X [M, K], L [M, R_PAD]; I is stored [R_PAD, K] where TRANSPOSED, else [K, R_PAD].
    One program owns BLOCK_M rows of L and walks K.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, R_PAD)
    rows = offs_m.to(tl.int64)[:, None]
    mask_m = (offs_m < M)[:, None]
    acc = tl.zeros((BLOCK_M, R_PAD), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(
            x_ptr + rows * stride_x + offs_k[None, :], mask=mask_m & mask_k[None, :], other=0.0
        )
        if DROPOUT:
            keep = dropout_keep(seed_ptr, rows, offs_k[None, :], K, dropout)
            x = tl.where(keep, x.to(tl.float32) / (1 - dropout), 0.0).to(x.dtype)
        # [BLOCK_M, BLOCK_K] @ [BLOCK_K, R_PAD] -> [BLOCK_M, R_PAD]
        if TRANSPOSED:
            inner = tl.load(
                inner_ptr + offs_r[:, None] * K + offs_k[None, :], mask=mask_k[None, :], other=0.0
            )
            acc = tl.dot(x, inner.T, acc)
        else:
            inner = tl.load(
                inner_ptr + offs_k[:, None] * R_PAD + offs_r[None, :],
                mask=mask_k[:, None], other=0.0,
            )  # fmt: skip
            acc = tl.dot(x, inner, acc)
    tl.store(
        low_ptr + rows * R_PAD + offs_r[None, :], acc.to(low_ptr.dtype.element_ty), mask=mask_m
    )


def launch_low_rank(
    x: Tensor,
    inner: Tensor,
    *,
    transposed: bool,
    seed: Tensor | None,
    dropout: float,
    block_m: int = 64,
    block_k: int = 128,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Tensor:
    """Return L [M, R_PAD] for X [M, K]; ``seed`` [1] int64 switches dropout on."""
    m, k = x.shape
    r_pad = inner.shape[0] if transposed else inner.shape[1]
    low = torch.empty((m, r_pad), dtype=x.dtype, device=x.device)
    if m == 0:
        return low
    if r_pad > 64:
        block_k = 32
    _low_rank_kernel[(triton.cdiv(m, block_m),)](
        x, inner, seed, low,
        m, k,
        x.stride(0), dropout,
        TRANSPOSED=transposed, DROPOUT=seed is not None,
        BLOCK_M=block_m, BLOCK_K=block_k, R_PAD=r_pad,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return low
