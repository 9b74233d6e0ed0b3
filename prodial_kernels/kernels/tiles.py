"""Tile helpers that the kernels share."""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def tma_ready(matrix: Tensor) -> bool:
    """Whether the copy engine can address the matrix: 16-byte base and row stride."""
    return matrix.stride(0) * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0


def tiled(matrix: Tensor | None, tile: list[int], tma: bool) -> object:
    """Return what ``load_tile`` takes as its source: a tensor descriptor where ``tma`` is set."""
    if matrix is None or not tma:
        return matrix
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), tile)


@triton.jit
def swizzled_tile(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile number -> (row tile, column tile), GROUP_M row tiles deep so that L2 is reused."""
    tiles_in_group = GROUP_M * tiles_n
    group = tile // tiles_in_group
    first_m = group * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    tile_m = first_m + (tile % tiles_in_group) % group_m
    tile_n = (tile % tiles_in_group) // group_m
    # Rotated from group to group, so that no program always meets the same column of tiles.
    return tile_m, (tile_n + group) % tiles_n


@triton.jit
def load_tile(
    source, row, column, rows, columns, stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Load a [BLOCK_ROWS, BLOCK_COLUMNS] tile of a row-major matrix; zero outside of it.

    ``source`` is a tensor descriptor where TMA is set, else a pointer.
    """
    if TMA:
        tile = source.load([row, column])
    else:
        offs_row = row + tl.arange(0, BLOCK_ROWS)
        offs_column = column + tl.arange(0, BLOCK_COLUMNS)
        inside = (offs_row < rows)[:, None] & (offs_column < columns)[None, :]
        pointers = source + offs_row.to(tl.int64)[:, None] * stride + offs_column[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def store_tile(
    target, row, column, rows, columns, stride, tile,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Store a [BLOCK_ROWS, BLOCK_COLUMNS] tile, cut at the matrix's edge."""
    if TMA:
        target.store([row, column], tile)
    else:
        offs_row = row + tl.arange(0, BLOCK_ROWS)
        offs_column = column + tl.arange(0, BLOCK_COLUMNS)
        inside = (offs_row < rows)[:, None] & (offs_column < columns)[None, :]
        pointers = target + offs_row.to(tl.int64)[:, None] * stride + offs_column[None, :]
        tl.store(pointers, tile, mask=inside)


@triton.jit
def load_deviation(blocks_ptr, row, column, K, P: tl.constexpr, RELU: tl.constexpr):
    """E[row, column] of E = D_b − I for broadcastable indices; zero outside the blocks.

    D_a is stored [K / P, P, P], so element (o, i) of a block lies at o·P + i % P.
    """
    inside = (row < K) & (column < K) & (row // P == column // P)
    a = tl.load(blocks_ptr + row * P + column % P, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        # where(a < 0, 0, -a) rather than a maximum: NaN passes through.
        a = tl.where(row == column, tl.where(a < 0, 0.0, -a), a)
    return a


@triton.jit
def dropout_keep(seed_ptr, row, column, K, dropout):
    """Which elements of X [M, K] the LoRA branch keeps: the same in forward and backward."""
    seed = tl.load(seed_ptr)
    return tl.rand(seed, row * K + column) >= dropout
