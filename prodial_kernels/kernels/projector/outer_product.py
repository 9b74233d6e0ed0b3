"""F = dYᵀ X in parts, for a weight so small that every gradient of the adapter comes from F."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import ceil_div
from prodial_kernels.kernels.projector.tiles import load_tile, partial_sums, tiled, tma_ready
from prodial_kernels.kernels.replay.recorder import launch


class OuterTile(NamedTuple):
    """Compile-time sizes of ``_outer_product_kernel``: tokens of a step, N and K of a tile."""

    block_m: int
    block_n: int
    block_k: int


@triton.jit
def _outer_product_kernel(
    dy, x, f_ptr, M, N, K, stride_dy, stride_x, steps_per_split,
    TMA: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """F_part [splits, N, K] = dYᵀ X over each split of the tokens, from dY [M, N], X [M, K].

    A program owns a [BLOCK_N, BLOCK_K] tile of F and one split: ``steps_per_split`` steps.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    BLOCK_K: tl.constexpr = TILE.block_k
    across = tl.cdiv(K, BLOCK_K)
    row = tl.program_id(0) // across * BLOCK_N
    column = tl.program_id(0) % across * BLOCK_K
    split = tl.program_id(1)
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    start = split * steps_per_split
    for step in range(start, tl.minimum(start + steps_per_split, tl.cdiv(M, BLOCK_M))):
        m = step * BLOCK_M
        dy_tile = load_tile(dy, 0, m, row, M, N, stride_dy, 0, BLOCK_M, BLOCK_N, False, TMA)
        x_tile = load_tile(x, 0, m, column, M, K, stride_x, 0, BLOCK_M, BLOCK_K, False, TMA)
        # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_K] -> [BLOCK_N, BLOCK_K]
        acc = tl.dot(dy_tile.T, x_tile, acc)
    offs_n = row + tl.arange(0, BLOCK_N)
    offs_k = column + tl.arange(0, BLOCK_K)
    target = f_ptr + (split.to(tl.int64) * N + offs_n)[:, None] * K + offs_k[None, :]
    tl.store(target, acc, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :])


def choose_outer_product(n: int, k: int) -> OuterTile:
    """The tile that reads the least of dY and X for an F [n, k] of a few hundred rows, columns."""

    def read(tile: OuterTile) -> int:
        tiles = ceil_div(n, tile.block_n) * ceil_div(k, tile.block_k)
        return tiles * (tile.block_n + tile.block_k)

    return min((OuterTile(64, *s) for s in ((128, 128), (128, 256), (256, 128))), key=read)


def launch_outer_product(
    dy: Tensor, x: Tensor, *, programs: int, scratch: Tensor | None, hopper: bool
) -> Tensor:
    """Return the parts of F = dYᵀ X, fp32 [splits, N, K], for dY [M, N] and X [M, K].

    Args:
        dy: dY.
        x: X.
        programs: How many programs share the work, about.
        scratch: 16-bit, contiguous; overwritten by the parts, as many as it holds, if it holds one.
        hopper: Whether the device is one, whose tiles are larger.
    """
    (m, n), k = dy.shape, x.shape[1]
    tile = choose_outer_product(n, k) if hopper else OuterTile(32, 64, 64)
    tiles = ceil_div(n, tile.block_n) * ceil_div(k, tile.block_k)
    steps = ceil_div(m, tile.block_m)
    splits = max(1, min(programs // tiles, steps))
    held = 0 if scratch is None else scratch.numel() // (2 * n * k)
    if held:
        splits = min(splits, held)
    each = ceil_div(steps, splits)
    splits = ceil_div(steps, each)
    if held and scratch is not None:
        held_parts = scratch.view(-1).narrow(0, 0, 2 * splits * n * k)
        parts = held_parts.view(torch.float32).view(splits, n, k)
    else:
        parts = partial_sums(splits, n, k, device=dy.device)
    tma = hopper and tma_ready(dy) and tma_ready(x)
    if hopper and not tma:
        # Addresses take the registers that a wide tile would.
        tile = OuterTile(64, 128, 128) if tile.block_n * tile.block_k > 128 * 128 else tile
        tiles = ceil_div(n, tile.block_n) * ceil_div(k, tile.block_k)
    launch(
        _outer_product_kernel, (tiles, splits),
        dy=tiled(dy, [tile.block_m, tile.block_n], tma),
        x=tiled(x, [tile.block_m, tile.block_k], tma), f_ptr=parts,
        M=m, N=n, K=k, stride_dy=dy.stride(0), stride_x=x.stride(0), steps_per_split=each,
        TMA=tma, TILE=tile, num_warps=8 if hopper else 4, num_stages=3,
    )  # fmt: skip
    return parts
