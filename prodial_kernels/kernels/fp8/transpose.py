"""A stored weight, transposed for the product towards the input."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import ceil_div
from prodial_kernels.kernels.fp8.quantize import GROUP
from prodial_kernels.kernels.replay.recorder import launch


@triton.jit
def _transpose_kernel(
    codes_ptr, scale_ptr, codes_out_ptr, scale_out_ptr, N, K, stride_scale, stride_out,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Codes [N, K] -> [K, N], scales [⌈N / GROUP⌉, ⌈K / GROUP⌉] likewise; a program owns a tile."""
    tiles_n = tl.cdiv(N, GROUP)
    tile_n, tile_k = tl.program_id(0) % tiles_n, tl.program_id(0) // tiles_n
    offs_n = tile_n * GROUP + tl.arange(0, GROUP)
    mask_n = offs_n < N
    # By halves, whose addresses fit into registers where rows begin anywhere.
    for half in range(0, GROUP, GROUP // 2):
        offs_k = tile_k * GROUP + half + tl.arange(0, GROUP // 2)
        mask_k = offs_k < K
        tile = tl.load(
            codes_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :],
            mask=mask_n[:, None] & mask_k[None, :], other=0.0,
        )  # fmt: skip
        tl.store(
            codes_out_ptr + offs_k.to(tl.int64)[:, None] * N + offs_n[None, :], tile.T,
            mask=mask_k[:, None] & mask_n[None, :],
        )  # fmt: skip
    scale = tl.load(scale_ptr + tile_n * stride_scale + tile_k)
    tl.store(scale_out_ptr + tile_k * stride_out + tile_n, scale)
    if tile_n == tiles_n - 1:
        # What only fills a row up is read by nobody, and yet no NaN.
        fill = tiles_n + tl.arange(0, 4)
        tl.store(scale_out_ptr + tile_k * stride_out + fill, 0.0, mask=fill < stride_out)


def launch_transpose(codes: Tensor, scale_inv: Tensor) -> tuple[Tensor, Tensor]:
    """Return Wᵀ [K, N] of W [N, K]: transient codes, a byte each, and their scales.

    Those are [⌈K / 128⌉, ⌈N / 128⌉ rounded up to 4] fp32; what is beyond ⌈N / 128⌉ is 0.
    """
    n, k = codes.shape
    tiles_n, tiles_k = ceil_div(n, GROUP), ceil_div(k, GROUP)
    out = torch.empty((k, n), dtype=codes.dtype, device=codes.device)
    scales = torch.empty(
        (tiles_k, ceil_div(tiles_n, 4) * 4), dtype=torch.float32, device=codes.device
    )
    launch(
        _transpose_kernel, (tiles_n * tiles_k,),
        codes_ptr=codes, scale_ptr=scale_inv, codes_out_ptr=out, scale_out_ptr=scales,
        N=n, K=k, stride_scale=scale_inv.stride(0), stride_out=scales.stride(0), GROUP=GROUP,
        num_warps=8,
    )  # fmt: skip
    return out, scales
