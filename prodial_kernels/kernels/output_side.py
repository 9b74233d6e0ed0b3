"""Gradients summed over tokens on the output side: B, s and the bias."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.launch import OutputSideConfig, split_tokens

# Above this rank Lᵀ L does not fit into registers beside the sums.
MAX_GRAM_RANK = 64


@triton.jit
def _output_side_kernel(
    dy_ptr, y_ptr, low_ptr, bias_ptr, b_ptr, scale_ptr,
    partial_b_ptr, partial_scale_ptr, partial_bias_ptr,
    M, N,
    stride_dy, stride_y, rows_per_split,
    NEED_B: tl.constexpr, NEED_SCALE: tl.constexpr, NEED_BIAS: tl.constexpr,
    HAS_LORA: tl.constexpr, HAS_BIAS: tl.constexpr, GRAM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, R_PAD: tl.constexpr,
):  # fmt: skip
    """Sums over one split of the tokens, to be added up by reduce.py.

    dB_part [splits, N, R_PAD] = dYᵀ L;  dbias_part [splits, N] = Σ dY;
    ds_part [splits, N] = [Σ dY ⊙ (Y − bias) − Σ_r dB_part ⊙ B'] / s,
    from dY, Y [M, N], L [M, R_PAD], B' = α B [N, R_PAD], s, bias [N].
    The division loses digits where s ⊙ (U Wᵀ) is small beside the rest of Y; there, and where
    s = 0, ds_part is NaN, which asks exact_scale.py for it.
    GRAM: |L B'ᵀ|² comes from Lᵀ L and the LoRA term leaves the sum at the end; otherwise, where
    Lᵀ L is too large to hold, L B'ᵀ is taken off each tile of Y.
    One program owns BLOCK_N columns of one split.
    """
    split = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_r = tl.arange(0, R_PAD)
    start = split * rows_per_split
    stop = tl.minimum(start + rows_per_split, M)

    if HAS_LORA:
        acc_b = tl.zeros((BLOCK_N, R_PAD), dtype=tl.float32)
        if NEED_SCALE:
            if GRAM:
                acc_gram = tl.zeros((R_PAD, R_PAD), dtype=tl.float32)
            b = tl.load(
                b_ptr + offs_n.to(tl.int64)[:, None] * R_PAD + offs_r[None, :],
                mask=mask_n[:, None], other=0.0,
            )  # fmt: skip
    if NEED_SCALE:
        dy_y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        y_y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if HAS_BIAS or not GRAM:
            rest = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if NEED_BIAS:
        dy_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    for m in range(start, stop, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < stop
        mask = mask_m[:, None] & mask_n[None, :]
        rows = offs_m.to(tl.int64)[:, None]
        dy = tl.load(dy_ptr + rows * stride_dy + offs_n[None, :], mask=mask, other=0.0)
        if HAS_LORA:
            low = tl.load(low_ptr + rows * R_PAD + offs_r[None, :], mask=mask_m[:, None], other=0.0)
            # [BLOCK_N, BLOCK_M] @ [BLOCK_M, R_PAD] -> [BLOCK_N, R_PAD]
            acc_b = tl.dot(dy.T, low, acc_b)
            if NEED_SCALE and GRAM:
                # [R_PAD, BLOCK_M] @ [BLOCK_M, R_PAD] -> [R_PAD, R_PAD]
                acc_gram = tl.dot(low.T, low, acc_gram)
        wide_dy = dy.to(tl.float32)
        if NEED_SCALE:
            y = tl.load(y_ptr + rows * stride_y + offs_n[None, :], mask=mask, other=0.0)
            y = y.to(tl.float32)
            y_y += y * y
            if HAS_BIAS:
                y = tl.where(mask, y - bias[None, :], 0.0)
            if not GRAM:
                # [BLOCK_M, R_PAD] @ [R_PAD, BLOCK_N] -> [BLOCK_M, BLOCK_N]
                y -= tl.dot(low, b.T)
            if HAS_BIAS or not GRAM:
                rest += y * y
            dy_y += wide_dy * y
        if NEED_BIAS:
            dy_sum += wide_dy

    part = split.to(tl.int64) * N + offs_n
    if HAS_LORA and NEED_B:
        target = partial_b_ptr + part[:, None] * R_PAD + offs_r[None, :]
        tl.store(target, acc_b, mask=mask_n[:, None])
    if NEED_BIAS:
        tl.store(partial_bias_ptr + part, tl.sum(dy_sum, 0), mask=mask_n)
    if NEED_SCALE:
        scaled = tl.sum(dy_y, 0)
        norm_y = tl.sqrt(tl.sum(y_y, 0))
        norm_rest = norm_y
        if HAS_BIAS or not GRAM:
            norm_rest = tl.sqrt(tl.sum(rest, 0))
        if HAS_LORA and GRAM:
            wide_b = b.to(tl.float32)
            scaled -= tl.sum(acc_b * wide_b, 1)
            # [BLOCK_N, R_PAD] @ [R_PAD, R_PAD] -> [BLOCK_N, R_PAD]
            squares = tl.sum(tl.dot(wide_b, acc_gram, input_precision="ieee") * wide_b, 1)
            norm_rest -= tl.sqrt(tl.maximum(squares, 0.0))
        scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=1.0).to(tl.float32)
        # |s U Wᵀ| must be at least |Y| / 2: rounding Y then costs at most twice what rounding U Wᵀ
        # would. Below 2^-60 the quotient can leave fp32's range.
        sound = (norm_rest >= 0.5 * norm_y) & (tl.abs(scale) > 8.7e-19)
        ds = tl.where(sound, scaled / tl.where(sound, scale, 1.0), float("nan"))
        tl.store(partial_scale_ptr + part, ds, mask=mask_n)


def launch_output_side(
    dy: Tensor,
    y: Tensor | None,
    low: Tensor | None,
    b: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    *,
    need_b: bool,
    need_scale: bool,
    need_bias: bool,
    config: OutputSideConfig,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    """Return the parts in fp32 (dB [S, N, R_PAD], ds [S, N], dbias [S, N]) and tokens per split.

    A part that is not needed is None.
    """
    m, n = dy.shape
    r_pad = 16 if low is None else low.shape[1]
    columns = triton.cdiv(n, config.block_n)
    splits, rows = split_tokens(m, columns, config.block_m, config.programs)

    def partial(*shape: int) -> Tensor:
        return torch.empty((splits, *shape), dtype=torch.float32, device=dy.device)

    partial_b = partial(n, r_pad) if need_b else None
    partial_scale = partial(n) if need_scale else None
    partial_bias = partial(n) if need_bias else None
    _output_side_kernel[(columns, splits)](
        dy, y, low, bias, b, scale,
        partial_b, partial_scale, partial_bias,
        m, n,
        dy.stride(0), 0 if y is None else y.stride(0), rows,
        NEED_B=need_b, NEED_SCALE=need_scale, NEED_BIAS=need_bias,
        HAS_LORA=low is not None, HAS_BIAS=bias is not None,
        GRAM=low is None or r_pad <= MAX_GRAM_RANK,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, R_PAD=r_pad,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return partial_b, partial_scale, partial_bias, rows
