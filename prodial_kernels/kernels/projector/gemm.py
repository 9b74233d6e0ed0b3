"""The two large products: forward with the LoRA term added, and towards the input."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.tile_sizes import MAX_FUSED_RANK, GemmConfig, pointer_gemm
from prodial_kernels.kernels.projector.pdl import pdl_options, wait_for_previous
from prodial_kernels.kernels.projector.tiles import (
    load_tile,
    store_tile,
    swizzled_tile,
    tiled,
    tma_ready,
    token_shape,
)
from prodial_kernels.kernels.replay.recorder import launch
from prodial_kernels.kernels.replay.streams import SideStream

# What the epilogue adds of L at a time without the copy engine: slices of 32 came out wrong or
# reached outside of memory (triton 3.6.0, H100), slices of 16 are right.
POINTER_SLICE = 16
# The widest rank that the epilogue adds, in slices of MAX_FUSED_RANK that the copy engine loads; a
# library product adds others. At rank 256 that is the faster (1553 against 1577 µs a step, 8192
# tokens of 2048 → 8192 on an H200), at 128 the slower (1222 against 1196).
MAX_ADDED_RANK = 128


class GemmTile(NamedTuple):
    """Compile-time sizes of ``_gemm_kernel``.

    Attributes:
        block_m, block_n, block_k: A step multiplies [block_m, block_k] by [block_k, block_n].
        rank: R_PAD, the padded rank.
        rank_slice: What the epilogue adds of a loaded L at a time.
        group_m: Row tiles that share L2, see :func:`swizzled_tile`.
        flatten: Whether the loops over tiles and over K become one.
        subtile: Whether a tile is stored in two halves, which takes half the shared memory.
    """

    block_m: int
    block_n: int
    block_k: int
    rank: int
    rank_slice: int
    group_m: int
    flatten: bool
    subtile: bool


class GemmLayout(NamedTuple):
    """How the operands of ``_gemm_kernel`` lie in memory; a compile-time constant.

    Attributes:
        left_t: Whether X is stored [K, M] instead of [M, K].
        right_t: Whether V is stored [N, K] instead of [K, N].
        rows_batched: Whether X, Y and L are ``batches`` matrices of M rows each.
        columns_batched: Whether V, Y and O are ``batches`` such matrices, and s and the bias belong
            to rows, else to columns.
        tma: Whether the copy engine loads and stores: matrices are tensor descriptors, else
            pointers.
    """

    left_t: bool
    right_t: bool
    rows_batched: bool
    columns_batched: bool
    tma: bool


@triton.jit
def _gemm_kernel(
    left, right, inner, outer, low_ptr, deviation_ptr, bias_ptr, y,
    M, N, K, batches,
    stride_left, stride_right, stride_y, batch_left, batch_right, batch_y,
    LAYOUT: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Y = s ⊙ (X V) (+ L Oᵀ) (+ bias), and L = X I; X is ``left``, V ``right``.

    X [M, K], V [K, N], Y [M, N], as ``GemmLayout`` says. Given ``inner``, Iᵀ [R_PAD, K], every tile
    computes its rows of L [M, R_PAD] in a second accumulator, and the first column of tiles writes
    them. Given ``outer``, O [N, R_PAD], L Oᵀ is added; L is read if ``inner`` is not given. The
    deviation is s − 1; s and the bias are left out where None.
    PDL: launched while the launch that makes its operands drains.
    A program owns [BLOCK_M, BLOCK_N] tiles of Y, one after another, and walks K once for each.
    """
    if PDL:
        wait_for_previous()
    FUSED_LOW_RANK: tl.constexpr = inner is not None
    UPDATE: tl.constexpr = outer is not None
    ROWS_BATCHED: tl.constexpr = LAYOUT.rows_batched
    COLUMNS_BATCHED: tl.constexpr = LAYOUT.columns_batched
    BATCHED: tl.constexpr = ROWS_BATCHED or COLUMNS_BATCHED
    TMA: tl.constexpr = LAYOUT.tma
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    R_PAD: tl.constexpr = TILE.rank
    dtype: tl.constexpr = left.dtype if TMA else left.dtype.element_ty
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    all_m = tiles_m * batches if ROWS_BATCHED else tiles_m
    all_n = tiles_n * batches if COLUMNS_BATCHED else tiles_n

    for tile in tl.range(tl.program_id(0), all_m * all_n, tl.num_programs(0), flatten=TILE.flatten):
        tile_m, tile_n = swizzled_tile(tile, all_m, all_n, TILE.group_m)
        batch = tile_m * 0
        if ROWS_BATCHED:
            batch = tile_m // tiles_m
            tile_m = tile_m % tiles_m
        if COLUMNS_BATCHED:
            batch = tile_n // tiles_n
            tile_n = tile_n % tiles_n
        row = tile_m * BLOCK_M
        column = tile_n * BLOCK_N
        offs_m = row + tl.arange(0, BLOCK_M)
        low_rows = (batch * M + offs_m if ROWS_BATCHED else offs_m).to(tl.int64)[:, None]
        acc, acc_low = _multiply(
            left, right, inner, batch, row, column, M, N, K,
            stride_left, stride_right, batch_left, batch_right, LAYOUT, TILE,
        )  # fmt: skip
        if FUSED_LOW_RANK:
            low_tile = acc_low.to(dtype)
            if tile_n == 0:
                target = low_ptr + low_rows * R_PAD + tl.arange(0, R_PAD)[None, :]
                tl.store(target, low_tile, mask=(offs_m < M)[:, None])
        if deviation_ptr is not None:
            acc *= 1 + _along_features(
                deviation_ptr, row, column, M, N, COLUMNS_BATCHED, BLOCK_M, BLOCK_N
            )
        if FUSED_LOW_RANK and UPDATE:
            acc = _accumulate(
                acc, low_tile, outer, batch, 0, column, R_PAD, N, R_PAD, 0,
                True, BLOCK_N, R_PAD, False, TMA,
            )  # fmt: skip
        elif FUSED_LOW_RANK and TILE.flatten:
            # Adds nothing: behind a flattened loop of two products ptxas wants a third, or it lets
            # those in the loop wait for each other (its C7515), which takes twice the time.
            nothing = tl.zeros((BLOCK_M, 16), dtype=dtype)
            acc = tl.dot(nothing, tl.zeros((16, BLOCK_N), dtype=dtype), acc)
        elif UPDATE:
            R_SLICE: tl.constexpr = TILE.rank_slice
            # Unrolled, so that the tile stays one loop and flattening can work.
            for r in tl.static_range(0, R_PAD, R_SLICE):
                offs_r = r + tl.arange(0, R_SLICE)
                source = low_ptr + low_rows * R_PAD + offs_r[None, :]
                low_tile = tl.load(source, mask=(offs_m < M)[:, None], other=0.0)
                acc = _accumulate(
                    acc, low_tile, outer, batch, r, column, R_PAD, N, R_PAD, N * R_PAD,
                    True, BLOCK_N, R_SLICE, COLUMNS_BATCHED, TMA,
                )  # fmt: skip
        if bias_ptr is not None:
            acc += _along_features(bias_ptr, row, column, M, N, COLUMNS_BATCHED, BLOCK_M, BLOCK_N)
        if TILE.subtile:
            # Two halves need half the shared memory on the way out.
            HALF: tl.constexpr = BLOCK_N // 2
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1))
            first, second = tl.split(halves)
            store_tile(
                y, batch, row, column, M, N, stride_y, batch_y, first.to(dtype),
                BLOCK_M, HALF, BATCHED, TMA,
            )  # fmt: skip
            store_tile(
                y, batch, row, column + HALF, M, N, stride_y, batch_y, second.to(dtype),
                BLOCK_M, HALF, BATCHED, TMA,
            )  # fmt: skip
        else:
            store_tile(
                y, batch, row, column, M, N, stride_y, batch_y, acc.to(dtype),
                BLOCK_M, BLOCK_N, BATCHED, TMA,
            )  # fmt: skip


@triton.jit
def _multiply(
    left, right, inner, batch, row, column, M, N, K,
    stride_left, stride_right, batch_left, batch_right,
    LAYOUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The walk along K for the tile of Y that begins at (row, column).

    X V [BLOCK_M, BLOCK_N], and X Iᵀ [BLOCK_M, R_PAD] for its rows: zero without ``inner``.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    BLOCK_K: tl.constexpr = TILE.block_k
    R_PAD: tl.constexpr = TILE.rank
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_low = tl.zeros((BLOCK_M, R_PAD), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        x_tile = _load_left(
            left, batch, row, k, M, K, stride_left, batch_left,
            LAYOUT.left_t, BLOCK_M, BLOCK_K, LAYOUT.rows_batched, LAYOUT.tma,
        )  # fmt: skip
        if inner is not None:
            # The small product first: behind the large one it costs twice as much.
            acc_low = _accumulate(
                acc_low, x_tile, inner, batch, k, 0, K, R_PAD, K, 0,
                True, R_PAD, BLOCK_K, False, LAYOUT.tma,
            )  # fmt: skip
        acc = _accumulate(
            acc, x_tile, right, batch, k, column, K, N, stride_right, batch_right,
            LAYOUT.right_t, BLOCK_N, BLOCK_K, LAYOUT.columns_batched, LAYOUT.tma,
        )  # fmt: skip
    return acc, acc_low


@triton.jit
def _along_features(
    vector_ptr, row, column, M, N,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What a vector has for a tile's rows, [BLOCK_M, 1], where ROWS, else columns, [1, BLOCK_N]."""
    if ROWS:
        offs = row + tl.arange(0, BLOCK_M)
        part = tl.load(vector_ptr + offs, mask=offs < M, other=0.0).to(tl.float32)[:, None]
    else:
        offs = column + tl.arange(0, BLOCK_N)
        part = tl.load(vector_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)[None, :]
    return part


@triton.jit
def _load_left(
    left, batch, row, k, M, K, stride, stride_batch,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BATCHED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_K] of a left operand that is stored [K, M] where TRANSPOSED, else [M, K]."""
    if TRANSPOSED:
        tile = load_tile(
            left, batch, k, row, K, M, stride, stride_batch, BLOCK_K, BLOCK_M, BATCHED, TMA
        ).T
    else:
        tile = load_tile(
            left, batch, row, k, M, K, stride, stride_batch, BLOCK_M, BLOCK_K, BATCHED, TMA
        )
    return tile


@triton.jit
def _accumulate(
    acc, left, right, batch, k, column, K, N, stride, stride_batch,
    TRANSPOSED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BATCHED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """acc += left · right, with ``right`` stored [N, K] where TRANSPOSED, else [K, N]."""
    # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_N] -> [BLOCK_M, BLOCK_N]
    if TRANSPOSED:
        tile = load_tile(
            right, batch, column, k, N, K, stride, stride_batch, BLOCK_N, BLOCK_K, BATCHED, TMA
        )
        acc = tl.dot(left, tile.T, acc)
    else:
        tile = load_tile(
            right, batch, k, column, K, N, stride, stride_batch, BLOCK_K, BLOCK_N, BATCHED, TMA
        )
        acc = tl.dot(left, tile, acc)
    return acc


def launch_gemm(
    x: Tensor,
    v: Tensor,
    y: Tensor,
    *,
    v_transposed: bool,
    config: GemmConfig,
    inner: Tensor | None = None,
    outer: Tensor | None = None,
    low: Tensor | None = None,
    scale_deviation: Tensor | None = None,
    bias: Tensor | None = None,
    length: int = 0,
    side: SideStream | None = None,
) -> Tensor | None:
    """Launch the kernel on 16-bit operands; return L [M, R_PAD] where it is given or made.

    A channel-first result is computed as Yᵀ = Vᵀ Xᵀ, so that its rows are features.

    Args:
        x: [M, K] with unit inner stride, or channel-first [b, K, l].
        v: [N, K] where ``v_transposed``, else [K, N].
        y: Y, which is written: [M, N], or channel-first [M / l, N, l].
        v_transposed: Forward (True) or towards the input (False).
        config: Tile sizes, for [N, M] where the result is channel-first.
        inner: Iᵀ, [R_PAD, K]: L = X I is computed. R_PAD ≤ MAX_FUSED_RANK; not with ``length``.
        outer: O, [N, R_PAD]: L Oᵀ is added, where R_PAD is too wide for the kernel's epilogue by
            a library product.
        low: L, [M, R_PAD]; needed with ``outer``, unless ``inner`` makes it.
        scale_deviation: s − 1, [N]; s is applied to X V alone.
        bias: [N].
        length: l of a channel-first Y, else 0.
        side: Where to launch; the current stream if None.
    """
    m, k = token_shape(x)
    n = v.shape[0] if v_transposed else v.shape[1]
    channel_first, x_channel_first = length > 0, x.ndim == 3
    batched = channel_first or x_channel_first
    if x_channel_first:
        length = x.shape[2]
    batches = m // length if m and batched else 1
    r_pad = 16
    if inner is not None:
        r_pad = inner.shape[0]
        low = torch.empty((m, r_pad), dtype=x.dtype, device=x.device)
    elif outer is not None:
        r_pad = outer.shape[1]
    if m == 0:
        return low

    tokens = x if x_channel_first or not batched else x.unflatten(0, (batches, length))
    if channel_first:
        left, right, left_t, right_t = v, tokens, not v_transposed, not x_channel_first
        rows, columns, target = n, length, y
        added, factor = outer, None if low is None else low.view(batches, length, r_pad)
    else:
        left, right, left_t, right_t = tokens, v, x_channel_first, v_transposed
        rows, columns = length if batched else m, n
        target = y.unflatten(0, (batches, length)) if batched else y
        added, factor = low, outer
    operands = (left, right, inner, factor if outer is not None else None, target)
    tma = config.tma and all(tma_ready(t) for t in operands if t is not None)
    if inner is not None and outer is not None and not tma:
        raise ValueError("inner: together with outer it takes operands that the copy engine loads")
    if config.tma and not tma:
        # A wide fused low-rank product or a bias takes the registers of a wide tile.
        narrow = bias is not None or (inner is not None and r_pad > 32)
        config = pointer_gemm(64 if narrow else 128, config.programs)
    bm, bn, bk = config.block_m, config.block_n, config.block_k
    r_slice = POINTER_SLICE
    if tma or inner is not None:
        r_slice = min(r_pad, MAX_FUSED_RANK)
    wide = outer is not None and r_pad > (MAX_ADDED_RANK if tma else MAX_FUSED_RANK)
    if wide:
        added, factor, r_pad, r_slice = None, None, 16, 16
    elif outer is None:
        factor = None

    # Flattening lets the copy engine prefetch; with pointers it gains nothing. It takes shared
    # memory of its own, which wide I and O, or several slices of O, do not leave.
    both_wide = inner is not None and outer is not None and r_pad > 32
    slices = r_pad // r_slice
    flatten = config.flatten and tma and not both_wide and slices == 1

    tiles = batches * triton.cdiv(rows, bm) * triton.cdiv(columns, bn)
    launch(
        _gemm_kernel, (min(tiles, config.programs) if config.programs else tiles,),
        left=tiled(left, [bk, bm] if left_t else [bm, bk], tma),
        right=tiled(right, [bn, bk] if right_t else [bk, bn], tma),
        inner=tiled(inner, [r_pad, bk], tma),
        outer=tiled(factor, [bn, r_slice], tma),
        low_ptr=added, deviation_ptr=scale_deviation, bias_ptr=bias,
        y=tiled(target, [bm, bn // 2 if config.subtile else bn], tma),
        M=rows, N=columns, K=k, batches=batches,
        stride_left=left.stride(-2), stride_right=right.stride(-2), stride_y=target.stride(-2),
        batch_left=left.stride(0), batch_right=right.stride(0), batch_y=target.stride(0),
        LAYOUT=GemmLayout(left_t, right_t, batched and not channel_first, channel_first, tma),
        TILE=GemmTile(bm, bn, bk, r_pad, r_slice, config.group_m, flatten, config.subtile),
        PDL=config.pdl,
        num_warps=config.num_warps, num_stages=config.num_stages, side=side,
        **pdl_options(config.pdl),
        **({"maxnreg": config.max_registers} if config.max_registers else {}),
    )  # fmt: skip
    if wide and outer is not None and low is not None:
        if channel_first:
            y.baddbmm_(outer.expand(batches, *outer.shape), low.view(batches, length, -1).mT)
        else:
            y.addmm_(low, outer.T)
    return low
