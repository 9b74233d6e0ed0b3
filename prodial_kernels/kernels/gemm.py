"""The two large products: forward with the LoRA term added, and towards the input."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.launch import MAX_FUSED_RANK, GemmConfig
from prodial_kernels.kernels.tiles import (
    load_tile,
    store_tile,
    swizzled_tile,
    tiled,
    tma_ready,
)


@triton.jit
def _gemm_kernel(
    x, v, inner, outer, low_ptr, bias_ptr, y,
    M, N, K,
    stride_x, stride_v, stride_y,
    V_TRANSPOSED: tl.constexpr, COMPANION: tl.constexpr, UPDATE: tl.constexpr,
    HAS_BIAS: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    R_PAD: tl.constexpr, R_BLOCK: tl.constexpr,
    GROUP_M: tl.constexpr, FLATTEN: tl.constexpr, SUBTILE: tl.constexpr,
):  # fmt: skip
    """Y = X V (+ L Oᵀ) (+ bias), and L = X I where COMPANION.

    X [M, K], Y [M, N]; V is stored [N, K] where V_TRANSPOSED (forward), else [K, N].
    UPDATE: L [M, R_PAD] is read and L Oᵀ added, O [N, R_PAD].
    COMPANION: L [M, R_PAD] is written, I [K, R_PAD], accumulated by the first column of tiles.
    A program owns [BLOCK_M, BLOCK_N] tiles of Y, one after another, and walks K once for each.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    dtype: tl.constexpr = x.dtype if TMA else x.dtype.element_ty

    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = swizzled_tile(tile, tiles_m, tiles_n, GROUP_M)
        row = tile_m * BLOCK_M
        column = tile_n * BLOCK_N
        offs_m = row + tl.arange(0, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if COMPANION:
            if tile_n == 0:
                acc_low = tl.zeros((BLOCK_M, R_PAD), dtype=tl.float32)
                for k in range(0, K, BLOCK_K):
                    x_tile = load_tile(x, row, k, M, K, stride_x, BLOCK_M, BLOCK_K, TMA)
                    acc = _accumulate(
                        acc, x_tile, v, k, column, K, N, stride_v,
                        V_TRANSPOSED, BLOCK_N, BLOCK_K, TMA,
                    )  # fmt: skip
                    acc_low = _accumulate(
                        acc_low, x_tile, inner, k, 0, K, R_PAD, R_PAD,
                        False, R_PAD, BLOCK_K, TMA,
                    )  # fmt: skip
                offs_r = tl.arange(0, R_PAD)
                target = low_ptr + offs_m.to(tl.int64)[:, None] * R_PAD + offs_r[None, :]
                tl.store(target, acc_low.to(dtype), mask=(offs_m < M)[:, None])
            else:
                for k in range(0, K, BLOCK_K):
                    x_tile = load_tile(x, row, k, M, K, stride_x, BLOCK_M, BLOCK_K, TMA)
                    acc = _accumulate(
                        acc, x_tile, v, k, column, K, N, stride_v,
                        V_TRANSPOSED, BLOCK_N, BLOCK_K, TMA,
                    )  # fmt: skip
        else:
            for k in range(0, K, BLOCK_K):
                x_tile = load_tile(x, row, k, M, K, stride_x, BLOCK_M, BLOCK_K, TMA)
                acc = _accumulate(
                    acc, x_tile, v, k, column, K, N, stride_v,
                    V_TRANSPOSED, BLOCK_N, BLOCK_K, TMA,
                )  # fmt: skip
        if UPDATE:
            # Unrolled, so that the tile stays one loop and FLATTEN can work.
            for r in tl.static_range(0, R_PAD, R_BLOCK):
                offs_r = r + tl.arange(0, R_BLOCK)
                source = low_ptr + offs_m.to(tl.int64)[:, None] * R_PAD + offs_r[None, :]
                low_tile = tl.load(source, mask=(offs_m < M)[:, None], other=0.0)
                acc = _accumulate(
                    acc, low_tile, outer, r, column, R_PAD, N, R_PAD,
                    True, BLOCK_N, R_BLOCK, TMA,
                )  # fmt: skip
        if HAS_BIAS:
            offs_n = column + tl.arange(0, BLOCK_N)
            acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        if SUBTILE:
            # Two halves need half the shared memory on the way out.
            HALF: tl.constexpr = BLOCK_N // 2
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1))
            left, right = tl.split(halves)
            store_tile(y, row, column, M, N, stride_y, left.to(dtype), BLOCK_M, HALF, TMA)
            store_tile(y, row, column + HALF, M, N, stride_y, right.to(dtype), BLOCK_M, HALF, TMA)
        else:
            store_tile(y, row, column, M, N, stride_y, acc.to(dtype), BLOCK_M, BLOCK_N, TMA)


@triton.jit
def _accumulate(
    acc, left, right, k, column, K, N, stride,
    TRANSPOSED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """acc += left · right, with ``right`` stored [N, K] where TRANSPOSED, else [K, N]."""
    # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_N] -> [BLOCK_M, BLOCK_N]
    if TRANSPOSED:
        tile = load_tile(right, column, k, N, K, stride, BLOCK_N, BLOCK_K, TMA)
        acc = tl.dot(left, tile.T, acc)
    else:
        tile = load_tile(right, k, column, K, N, stride, BLOCK_K, BLOCK_N, TMA)
        acc = tl.dot(left, tile, acc)
    return acc


def launch_gemm(
    x: Tensor,
    v: Tensor,
    *,
    v_transposed: bool,
    config: GemmConfig,
    inner: Tensor | None = None,
    outer: Tensor | None = None,
    low: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel on 16-bit operands; return (Y [M, N], L [M, R_PAD] or None).

    Args:
        x: [M, K], unit inner stride.
        v: [N, K] where ``v_transposed``, else [K, N].
        v_transposed: Forward (True) or towards the input (False).
        config: Tile sizes.
        inner: I, [K, R_PAD]: L = X I is computed. R_PAD ≤ MAX_FUSED_RANK.
        outer: O, [N, R_PAD]: ``low`` Oᵀ is added, where R_PAD is too wide for the kernel's
            epilogue by a library product.
        low: L, [M, R_PAD]; needed with ``outer``.
        bias: [N].
    """
    m, k = x.shape
    n = v.shape[0] if v_transposed else v.shape[1]
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    r_pad = 16
    if inner is not None:
        r_pad = inner.shape[1]
        low = torch.empty((m, r_pad), dtype=x.dtype, device=x.device)
    elif outer is not None:
        r_pad = outer.shape[1]
    if m == 0:
        return y, low
    bm, bn, bk = config.block_m, config.block_n, config.block_k
    r_block = min(r_pad, 32)
    tma = config.tma and all(tma_ready(t) for t in (x, v, inner, outer, y) if t is not None)
    # With pointers a second slice of L in the epilogue came out wrong (triton 3.6.0, H100).
    wide = None
    if outer is not None and r_pad > (MAX_FUSED_RANK if tma else r_block):
        wide, outer, r_pad, r_block = outer, None, 16, 16

    # Flattening helps the copy engine run ahead; with pointers it gains nothing.
    flatten = config.flatten and tma

    tiles = triton.cdiv(m, bm) * triton.cdiv(n, bn)
    _gemm_kernel[(min(tiles, config.programs) if config.programs else tiles,)](
        tiled(x, [bm, bk], tma),
        tiled(v, [bn, bk] if v_transposed else [bk, bn], tma),
        tiled(inner, [bk, r_pad], tma),
        tiled(outer, [bn, r_block], tma),
        None if wide is not None else low, bias,
        tiled(y, [bm, bn // 2 if config.subtile else bn], tma),
        m, n, k,
        x.stride(0), v.stride(0), y.stride(0),
        V_TRANSPOSED=v_transposed, COMPANION=inner is not None, UPDATE=outer is not None,
        HAS_BIAS=bias is not None, TMA=tma,
        BLOCK_M=bm, BLOCK_N=bn, BLOCK_K=bk, R_PAD=r_pad, R_BLOCK=r_block,
        GROUP_M=config.group_m, FLATTEN=flatten, SUBTILE=config.subtile,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if wide is not None and low is not None:
        y.addmm_(low, wide.T)
    return y, low
