"""Tile helpers that the kernels share."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from prodial_kernels.kernels.projector.operands import ProjectionOptions


class Diagonal(NamedTuple):
    """How a kernel reads D_b from D_a [K / P, P, P]; a compile-time constant.

    Attributes:
        p: P, the side of a block; 1 where there are none.
        relu: Whether D_a's diagonal passes through Eq. 7's relu.
    """

    p: int
    relu: bool


def diagonal_of(blocks: Tensor | None, options: ProjectionOptions) -> Diagonal:
    """How to read D_b from ``blocks``."""
    return Diagonal(block_size_of(blocks), options.diagonal == "relu")


class WalkTile(NamedTuple):
    """Compile-time sizes of a kernel that walks tiles: rows and columns, R_PAD, stages."""

    rows: int
    columns: int
    rank: int
    stages: int


def partial_sums(splits: int, *shape: int, device: torch.device) -> Tensor:
    """A new fp32 tensor [splits, *shape] for what the splits of a sum leave."""
    return torch.empty((splits, *shape), dtype=torch.float32, device=device)


def token_shape(matrix: Tensor) -> tuple[int, int]:
    """(tokens M, features F) of a matrix of tokens: [M, F], or channel-first [b, F, l]."""
    if matrix.ndim == 2:
        return matrix.shape[0], matrix.shape[1]
    return matrix.shape[0] * matrix.shape[2], matrix.shape[1]


def block_size_of(blocks: Tensor | None) -> int:
    """P of D_a [K / P, P, P]; 1 where there is none."""
    return 1 if blocks is None else blocks.shape[-1]


def tma_ready(tensor: Tensor) -> bool:
    """Whether the copy engine can address the tensor: 16-byte base and outer strides."""
    size = tensor.element_size()
    return tensor.data_ptr() % 16 == 0 and all(
        stride * size % 16 == 0 for stride in tensor.stride()[:-1]
    )


def tiled(tensor: Tensor | None, tile: list[int], tma: bool) -> object:
    """Return what ``load_tile`` takes as its source: a tensor descriptor where ``tma`` is set.

    Three dimensions are a batch of matrices, of which a tile takes part of one.
    """
    if tensor is None or not tma:
        return tensor
    whole = tile if tensor.ndim == 2 else [1, *tile]
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), whole)


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
    source, batch, row, column, rows, columns, stride, stride_batch,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BATCHED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Load a [BLOCK_ROWS, BLOCK_COLUMNS] tile of a row-major matrix; zero outside of it.

    ``source`` is a tensor descriptor where TMA is set, else a pointer. Where BATCHED it holds a
    batch of matrices, of which ``batch`` tells one.
    """
    if TMA:
        if BATCHED:
            tile = source.load([batch, row, column]).reshape(BLOCK_ROWS, BLOCK_COLUMNS)
        else:
            tile = source.load([row, column])
    else:
        offs_row = row + tl.arange(0, BLOCK_ROWS)
        offs_column = column + tl.arange(0, BLOCK_COLUMNS)
        inside = (offs_row < rows)[:, None] & (offs_column < columns)[None, :]
        pointers = source + offs_row.to(tl.int64)[:, None] * stride + offs_column[None, :]
        if BATCHED:
            pointers += batch.to(tl.int64) * stride_batch
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def store_tile(
    target, batch, row, column, rows, columns, stride, stride_batch, tile,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BATCHED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Store a [BLOCK_ROWS, BLOCK_COLUMNS] tile, cut at the matrix's edge. As ``load_tile``."""
    if TMA:
        if BATCHED:
            target.store([batch, row, column], tile.reshape(1, BLOCK_ROWS, BLOCK_COLUMNS))
        else:
            target.store([row, column], tile)
    else:
        offs_row = row + tl.arange(0, BLOCK_ROWS)
        offs_column = column + tl.arange(0, BLOCK_COLUMNS)
        inside = (offs_row < rows)[:, None] & (offs_column < columns)[None, :]
        pointers = target + offs_row.to(tl.int64)[:, None] * stride + offs_column[None, :]
        if BATCHED:
            pointers += batch.to(tl.int64) * stride_batch
        tl.store(pointers, tile, mask=inside)


@triton.jit
def token_pointers(
    base_ptr, tokens, features, LENGTH, stride, stride_batch, CHANNEL_FIRST: tl.constexpr
):
    """Pointers [tokens, features] into a matrix of tokens.

    Token-first it is [M, F] with row stride ``stride``; CHANNEL_FIRST it is [M / LENGTH, F, LENGTH]
    with feature stride ``stride``, and token m is number m % LENGTH of sequence m // LENGTH.
    """
    if CHANNEL_FIRST:
        sequence = (tokens // LENGTH).to(tl.int64) * stride_batch
        starts = (sequence + tokens % LENGTH)[:, None]
        pointers = base_ptr + starts + features.to(tl.int64)[None, :] * stride
    else:
        pointers = base_ptr + tokens.to(tl.int64)[:, None] * stride + features[None, :]
    return pointers


@triton.jit
def window_columns(window, K, P: tl.constexpr, WINDOW: tl.constexpr):
    """(columns, which of them exist) of window number ``window``: WINDOW // P whole blocks."""
    SPAN: tl.constexpr = (WINDOW // P) * P
    lane = tl.arange(0, WINDOW)
    offs_k = window * SPAN + lane
    return offs_k, (lane < SPAN) & (offs_k < K)


@triton.jit
def load_deviation(blocks_ptr, row, column, K, DIAGONAL: tl.constexpr):
    """E[row, column] of E = D_b − I for broadcastable indices; zero outside the blocks.

    D_a is stored [K / P, P, P], so element (o, i) of a block lies at o·P + i % P.
    """
    P: tl.constexpr = DIAGONAL.p
    inside = (row < K) & (column < K) & (row // P == column // P)
    a = tl.load(blocks_ptr + row * P + column % P, mask=inside, other=0.0).to(tl.float32)
    if DIAGONAL.relu:
        # where(a < 0, 0, -a) rather than a maximum: NaN passes through.
        a = tl.where(row == column, tl.where(a < 0, 0.0, -a), a)
    return a


@triton.jit
def load_factor(
    blocks_ptr, offs_k, K, dtype: tl.constexpr, DIAGONAL: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """What :func:`apply_diagonal` takes for the columns offs_k.

    Where P is 1 the diagonal of D_b, [WINDOW] in fp32, else E, or Eᵀ where TRANSPOSED, [WINDOW,
    WINDOW] in ``dtype``.
    """
    if DIAGONAL.p == 1:
        factor = 1 + load_deviation(blocks_ptr, offs_k, offs_k, K, DIAGONAL)
    elif TRANSPOSED:
        e = load_deviation(blocks_ptr, offs_k[None, :], offs_k[:, None], K, DIAGONAL)
        factor = e.to(dtype)
    else:
        e = load_deviation(blocks_ptr, offs_k[:, None], offs_k[None, :], K, DIAGONAL)
        factor = e.to(dtype)
    return factor


@triton.jit
def apply_diagonal(tile, wide, factor, P: tl.constexpr):
    """tile D_b = tile + tile E, or tile D_bᵀ, in fp32; ``wide`` is the tile in fp32."""
    if P == 1:
        wide *= factor[None, :]
    else:
        # [ROWS, WINDOW] @ [WINDOW, WINDOW] -> [ROWS, WINDOW]
        wide += tl.dot(tile, factor)
    return wide


@triton.jit
def deviation_sums(ROWS: tl.constexpr, WINDOW: tl.constexpr, P: tl.constexpr):
    """Zeros to sum dE in: [ROWS, WINDOW] where P is 1, else [WINDOW, WINDOW]."""
    if P == 1:
        sums = tl.zeros((ROWS, WINDOW), dtype=tl.float32)
    else:
        sums = tl.zeros((WINDOW, WINDOW), dtype=tl.float32)
    return sums


@triton.jit
def store_deviation(
    partial_ptr, split, sums, offs_k, mask_k, K, P: tl.constexpr
):  # fmt: skip
    """Store one split of dE_part [splits, K / P, P, P] for the whole blocks in the columns offs_k.

    ``sums`` as :func:`deviation_sums` makes it: it holds pairs of columns of two blocks as well, or
    where P is 1 rows that are still to be added up.
    """
    target = partial_ptr + split.to(tl.int64) * K * P
    if P == 1:
        tl.store(target + offs_k, tl.sum(sums, 0), mask=mask_k)
    else:
        row, column = offs_k[:, None], offs_k[None, :]
        kept = mask_k[:, None] & mask_k[None, :] & (row // P == column // P)
        tl.store(target + row * P + column % P, sums, mask=kept)


@triton.jit
def load_low_rank(
    inner_ptr, offs_k, offs_r, K, R, alpha, dtype: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """I [K, R] for the rows offs_k and the columns offs_r, in ``dtype``; zero outside of it.

    I = Aᵀ with A [R, K] where TRANSPOSED, else I = α B with B [K, R].
    """
    if TRANSPOSED:
        inner = tl.load(
            inner_ptr + offs_r[:, None] * K + offs_k[None, :],
            mask=(offs_r < R)[:, None] & (offs_k < K)[None, :], other=0.0,
        )  # fmt: skip
        tile = inner.to(dtype).T
    else:
        inner = tl.load(
            inner_ptr + offs_k[:, None] * R + offs_r[None, :],
            mask=(offs_k < K)[:, None] & (offs_r < R)[None, :], other=0.0,
        )  # fmt: skip
        tile = (inner.to(tl.float32) * alpha).to(dtype)
    return tile


@triton.jit
def dropout_keep(seed_ptr, row, column, K, dropout):
    """Which elements of X [M, K] the LoRA branch keeps: the same in forward and backward."""
    seed = tl.load(seed_ptr)
    return tl.rand(seed, row * K + column) >= dropout
