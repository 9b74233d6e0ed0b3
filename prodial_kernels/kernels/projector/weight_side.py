"""From F = dYᵀ X, the sums over the weight: ds and the blocks' gradient in one read of F and W."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import block_programs, block_window, split_tokens
from prodial_kernels.kernels.projector.tiles import block_size_of, load_deviation, store_deviation
from prodial_kernels.kernels.replay.recorder import launch

# Columns of a tile, loads in flight, and programs that share the rows.
WINDOW, STAGES, PROGRAMS = 64, 3, 264


@triton.jit
def _weight_side_kernel(
    f_ptr, w_ptr, blocks_ptr, deviation_ptr, partial_scale_ptr, partial_e_ptr,
    N, K, stride_f, stride_w, splits,
    P: tl.constexpr, RELU: tl.constexpr, HAS_BLOCKS: tl.constexpr, HAS_SCALE: tl.constexpr,
    NEED_SCALE: tl.constexpr, NEED_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Partial sums of ds = rowsum(F ⊙ (W + W E)) and dE_g = (s ⊙ W)_gᵀ F_g.

    F, W [N, K], E = D_b − I from D_a [K / P, P, P], s − 1 [N];
    ds_part [windows, N], dE_part [splits, K / P, P, P].
    One program owns whole blocks within WINDOW columns and every ``splits``-th tile of rows.
    """
    SPAN: tl.constexpr = (WINDOW // P) * P
    pid_k = tl.program_id(0)
    split = tl.program_id(1)
    lane = tl.arange(0, WINDOW)
    offs_k = pid_k * SPAN + lane
    mask_k = (lane < SPAN) & (offs_k < K)

    if HAS_BLOCKS:
        if P == 1:
            d = 1 + load_deviation(blocks_ptr, offs_k, offs_k, K, P, RELU)
            acc_e = tl.zeros((BLOCK_N, WINDOW), dtype=tl.float32)
        else:
            e = load_deviation(blocks_ptr, offs_k[:, None], offs_k[None, :], K, P, RELU)
            e = e.to(w_ptr.dtype.element_ty)
            acc_e = tl.zeros((WINDOW, WINDOW), dtype=tl.float32)

    for tile in tl.range(split, tl.cdiv(N, BLOCK_N), splits, num_stages=STAGES):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = offs_n.to(tl.int64)[:, None]
        mask_n = offs_n < N
        mask = mask_n[:, None] & mask_k[None, :]
        f = tl.load(f_ptr + rows * stride_f + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + rows * stride_w + offs_k[None, :], mask=mask, other=0.0)
        if NEED_SCALE:
            turned = w.to(tl.float32)
            if HAS_BLOCKS:
                if P == 1:
                    turned *= d[None, :]
                else:
                    # [BLOCK_N, WINDOW] @ [WINDOW, WINDOW] -> [BLOCK_N, WINDOW]
                    turned += tl.dot(w, e)
            target = partial_scale_ptr + pid_k.to(tl.int64) * N + offs_n
            tl.store(target, tl.sum(f * turned, 1), mask=mask_n)
        if NEED_BLOCKS:
            if HAS_SCALE:
                shift = tl.load(deviation_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
                f *= 1 + shift[:, None]
            if P == 1:
                acc_e += w.to(tl.float32) * f
            else:
                # fp16 may not hold F, but its share of the tile's largest element.
                largest = tl.maximum(tl.max(tl.abs(f)), 1e-30)
                # [WINDOW, BLOCK_N] @ [BLOCK_N, WINDOW] -> [WINDOW, WINDOW]
                acc_e += largest * tl.dot(w.T, (f / largest).to(w.dtype))

    if NEED_BLOCKS:
        store_deviation(partial_e_ptr, split, acc_e, offs_k, mask_k, K, P)


def launch_weight_side(
    f: Tensor,
    weight: Tensor,
    blocks: Tensor | None,
    scale_deviation: Tensor | None,
    *,
    relu: bool,
    need_scale: bool,
    need_blocks: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the fp32 parts (ds [windows, N], dE [splits, K / P, P, P]), those asked for.

    ``f`` [N, K] is fp32 or 16-bit, with unit inner stride like ``weight``.
    """
    n, k = weight.shape
    p = block_size_of(blocks)
    window = block_window(WINDOW, p)
    columns = block_programs(k, window, p)
    # The sums of a wide block leave registers for few rows.
    block_n = 32 if p <= 64 else 16
    splits, _ = split_tokens(n, columns, block_n, PROGRAMS)

    def partial(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=f.device)

    partial_scale = partial(columns, n) if need_scale else None
    partial_e = partial(splits, *blocks.shape) if need_blocks and blocks is not None else None
    launch(
        _weight_side_kernel, (columns, splits),
        f, weight, blocks, scale_deviation, partial_scale, partial_e,
        n, k, f.stride(0), weight.stride(0), splits,
        P=p, RELU=relu, HAS_BLOCKS=blocks is not None, HAS_SCALE=scale_deviation is not None,
        NEED_SCALE=need_scale, NEED_BLOCKS=partial_e is not None,
        BLOCK_N=block_n, WINDOW=window, STAGES=STAGES,
        num_warps=4 if p <= 64 else 8, num_stages=2,
    )  # fmt: skip
    return partial_scale, partial_e
