"""Weight side: V = s ⊙ (W D_b), and the LoRA factors in the compute dtype."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.tiles import load_deviation


@triton.jit
def _fold_kernel(
    w_ptr, blocks_ptr, scale_ptr, a_ptr, b_ptr,
    v_ptr, a_out_ptr, b_out_ptr,
    N, K, R, alpha,
    stride_w, stride_v,
    P: tl.constexpr, RELU: tl.constexpr,
    HAS_BLOCKS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_LORA: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, R_PAD: tl.constexpr,
):  # fmt: skip
    """V = s ⊙ (W + W E);  A' = A and B' = α B, zero-padded from R to R_PAD.

    W, V [N, K], E = D_b − I from D_a [K / P, P, P], s [N], A [R, K] -> A' [R_PAD, K],
    B [N, R] -> B' [N, R_PAD].
    One program owns BLOCK_N rows by as many whole blocks as fit into WINDOW columns.
    """
    SPAN: tl.constexpr = (WINDOW // P) * P
    pid_n = tl.program_id(0)
    pid_k = tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, WINDOW)
    offs_k = pid_k * SPAN + lane
    mask_n = offs_n < N
    mask_k = (lane < SPAN) & (offs_k < K)
    rows = offs_n.to(tl.int64)

    if HAS_BLOCKS or HAS_SCALE:
        mask = mask_n[:, None] & mask_k[None, :]
        w = tl.load(w_ptr + rows[:, None] * stride_w + offs_k[None, :], mask=mask, other=0.0)
        v = w.to(tl.float32)
        if HAS_BLOCKS:
            if P == 1:
                v *= 1 + load_deviation(blocks_ptr, offs_k, offs_k, K, P, RELU)[None, :]
            else:
                e = load_deviation(blocks_ptr, offs_k[:, None], offs_k[None, :], K, P, RELU)
                # [BLOCK_N, WINDOW] @ [WINDOW, WINDOW] -> [BLOCK_N, WINDOW]
                v += tl.dot(w, e.to(w.dtype))
        if HAS_SCALE:
            v *= tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
        tl.store(v_ptr + rows[:, None] * stride_v + offs_k[None, :], v.to(w.dtype), mask=mask)

    if HAS_LORA:
        offs_r = tl.arange(0, R_PAD)
        mask_r = offs_r < R
        if pid_n == 0:
            a = tl.load(
                a_ptr + offs_r[:, None] * K + offs_k[None, :],
                mask=mask_r[:, None] & mask_k[None, :], other=0.0,
            )  # fmt: skip
            target = a_out_ptr + offs_r[:, None] * K + offs_k[None, :]
            tl.store(target, a.to(a_out_ptr.dtype.element_ty), mask=mask_k[None, :])
        if pid_k == 0:
            b = tl.load(
                b_ptr + rows[:, None] * R + offs_r[None, :],
                mask=mask_n[:, None] & mask_r[None, :], other=0.0,
            )  # fmt: skip
            target = b_out_ptr + rows[:, None] * R_PAD + offs_r[None, :]
            b = (b.to(tl.float32) * alpha).to(b_out_ptr.dtype.element_ty)
            tl.store(target, b, mask=mask_n[:, None])


def launch_fold(
    weight: Tensor,
    blocks: Tensor | None,
    scale: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    alpha: float,
    relu: bool,
    r_pad: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return V [N, K] (``weight`` itself where nothing is folded), A' and B' or None."""
    n, k = weight.shape
    fold = blocks is not None or scale is not None
    v = torch.empty((n, k), dtype=weight.dtype, device=weight.device) if fold else weight
    a_out = b_out = None
    if lora_a is not None:
        a_out = torch.empty((r_pad, k), dtype=weight.dtype, device=weight.device)
        b_out = torch.empty((n, r_pad), dtype=weight.dtype, device=weight.device)
    if not fold and lora_a is None:
        return v, a_out, b_out
    p = 1 if blocks is None else blocks.shape[-1]
    window, block_n = fold_window(p), 32
    grid = (triton.cdiv(n, block_n), triton.cdiv(k, window // p * p))
    _fold_kernel[grid](
        weight, blocks, scale, lora_a, lora_b, v, a_out, b_out,
        n, k, 0 if lora_a is None else lora_a.shape[0], alpha,
        weight.stride(0), k,
        P=p, RELU=relu,
        HAS_BLOCKS=blocks is not None, HAS_SCALE=scale is not None, HAS_LORA=lora_a is not None,
        BLOCK_N=block_n, WINDOW=window, R_PAD=r_pad,
        num_warps=4,
    )  # fmt: skip
    return v, a_out, b_out


def fold_window(block_size: int) -> int:
    """Columns one program handles: a power of two that holds at least one block."""
    if block_size == 1:
        return 256
    return max(64, triton.next_power_of_2(block_size))
