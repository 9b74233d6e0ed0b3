"""The scale's gradient where the division form is not sound, from operands in fp8."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import ceil_div
from prodial_kernels.kernels.fp8.quantize import GROUP, round_group
from prodial_kernels.kernels.projector.exact_scale import asks_anew
from prodial_kernels.kernels.projector.tiles import Diagonal, load_deviation, partial_sums
from prodial_kernels.kernels.replay.recorder import launch


class ExactTile(NamedTuple):
    """Compile-time sizes: tokens and columns of dY in a step, at least the splits of ds_part."""

    block_m: int
    block_n: int
    splits: int


@triton.jit
def _exact_scale_kernel(
    dy_ptr, x_ptr, factor_ptr, codes_ptr, scale_ptr, partial_scale_ptr, exact_ptr,
    M, N, K, splits, stride_dy, stride_x, stride_scale,
    DIAGONAL: tl.constexpr, GROUP: tl.constexpr, CONVERTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """ds = Σ over the groups of rowsum((dYᵀ U) ⊙ W), for columns whose ds_part holds a NaN.

    dY [M, N], U = X ⊙ D [M, K] rounded to fp8 as forward did, W [N, K] in fp8, ds_part [splits, N]
    -> exact [⌈K / GROUP⌉, N]. A program owns BLOCK_N columns of dY and some of the groups. It ends
    at once where nothing is asked for: nearly always.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if asks_anew(partial_scale_ptr, offs_n, mask_n, splits, N, TILE.splits):
        groups = tl.cdiv(K, GROUP)
        for group in tl.range(tl.program_id(1), groups, tl.num_programs(1), num_stages=1):
            offs_k = group * GROUP + tl.arange(0, GROUP)
            mask_k = offs_k < K
            acc = tl.zeros((BLOCK_N, GROUP), dtype=tl.float32)
            for m in range(0, M, BLOCK_M):
                offs_m = m + tl.arange(0, BLOCK_M)
                rows = offs_m.to(tl.int64)[:, None]
                mask_m = (offs_m < M)[:, None]
                dy = tl.load(
                    dy_ptr + rows * stride_dy + offs_n[None, :],
                    mask=mask_m & mask_n[None, :], other=0.0,
                )  # fmt: skip
                x = tl.load(
                    x_ptr + rows * stride_x + offs_k[None, :],
                    mask=mask_m & mask_k[None, :], other=0.0,
                )  # fmt: skip
                wide = x.to(tl.float32)
                if factor_ptr is not None:
                    wide *= 1 + load_deviation(factor_ptr, offs_k, offs_k, K, DIAGONAL)[None, :]
                codes, scale = round_group(wide, CONVERTS)
                # Exact: four bits and a power of two.
                u = (codes.to(tl.float32) * scale[:, None]).to(x.dtype)
                # [BLOCK_N, BLOCK_M] @ [BLOCK_M, GROUP] -> [BLOCK_N, GROUP]
                acc = tl.dot(dy.T, u, acc)
            w = tl.load(
                codes_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :],
                mask=mask_n[:, None] & mask_k[None, :], other=0.0,
            )  # fmt: skip
            w_scale = tl.load(
                scale_ptr + (offs_n // GROUP) * stride_scale + group, mask=mask_n, other=0.0
            )
            ds = tl.sum(acc * w.to(tl.float32), 1) * w_scale
            tl.store(exact_ptr + group * N + offs_n, ds, mask=mask_n)


def launch_exact_scale(
    dy: Tensor,
    x: Tensor,
    codes: Tensor,
    scale_inv: Tensor,
    partial_scale: Tensor,
    *,
    factor: Tensor | None,
    relu: bool,
) -> Tensor:
    """Return exact [⌈K / 128⌉, N] in fp32, written only for columns with a NaN in the parts.

    Args:
        dy: dY, [M, N].
        x: X, [M, K].
        codes: W, [N, K] float8_e4m3fn.
        scale_inv: Its scales, [⌈N / 128⌉, ⌈K / 128⌉].
        partial_scale: ds_part, [splits, N].
        factor: D_a of 1×1 blocks, which X is multiplied by before it is rounded; None for no such.
        relu: Whether it passes through Eq. 7's relu.
    """
    (m, n), k = dy.shape, x.shape[1]
    groups = ceil_div(k, GROUP)
    exact = partial_sums(groups, n, device=dy.device)
    splits = partial_scale.shape[0]
    block_n = 32
    launch(
        _exact_scale_kernel, (ceil_div(n, block_n), min(groups, 4)),
        dy_ptr=dy, x_ptr=x, factor_ptr=factor, codes_ptr=codes, scale_ptr=scale_inv,
        partial_scale_ptr=partial_scale, exact_ptr=exact, M=m, N=n, K=k, splits=splits,
        stride_dy=dy.stride(0), stride_x=x.stride(0), stride_scale=scale_inv.stride(0),
        DIAGONAL=Diagonal(1, relu), GROUP=GROUP, CONVERTS=dy.is_cuda,
        TILE=ExactTile(32, block_n, triton.next_power_of_2(splits)), num_warps=4, num_stages=1,
    )  # fmt: skip
    return exact
