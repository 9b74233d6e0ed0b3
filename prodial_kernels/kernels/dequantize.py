"""Stored weights to dense ones at the speed of memory: NF4, int8 and fp8.

The bits are those of the PyTorch code in :mod:`prodial_kernels.quantization`, which defines them:
the same fp32 operations in the same order, one rounding to the output's dtype. So no product may be
fused with a sum into one rounding.

Stored tensors are contiguous, and as the kernels' docstrings give them. ``out`` is a contiguous
[N, K] in ``dtype``, of 16 or 32 bits, to write to; None for a new tensor.
"""

from collections.abc import Hashable

import torch
import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import ceil_div
from prodial_kernels.kernels.replay.recorded_calls import replayed
from prodial_kernels.kernels.replay.recorder import Function, launch

# Weights that a program writes: 16 a thread, which is two wide stores.
SPAN = 2048
# A side of fp8's tiles; a program stays within one.
TILE = 128


@triton.jit
def _nf4_blocks(
    codes_ptr, absmax_ptr, table_ptr, outer_ptr, nested_table_ptr, offset_ptr, out_ptr,
    COUNT, BYTES, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Of :func:`_nf4_kernel` and :func:`_nf4_some_kernel`: the blocks of program_id(0)."""
    HALF: tl.constexpr = BLOCKSIZE // 2
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    left = COUNT - first * BLOCKSIZE
    block = tl.arange(0, BLOCKS)
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    codes = tl.load(codes_ptr + first * HALF + byte, mask=byte < BYTES - first * HALF, other=0)
    known = block * BLOCKSIZE < left
    absmax = tl.load(absmax_ptr + first + block, mask=known, other=0)
    if NESTED:
        outer = tl.load(outer_ptr + (first + block) // NESTED, mask=known, other=0)
        absmax = tl.load(nested_table_ptr + absmax.to(tl.int32)) * outer + tl.load(offset_ptr)
    earlier = tl.load(table_ptr + (codes >> 4).to(tl.int32))
    later = tl.load(table_ptr + (codes & 15).to(tl.int32))
    # [BLOCKS, HALF] twice -> [BLOCKS, BLOCKSIZE]
    w = tl.interleave(earlier, later) * absmax[:, None]
    at = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    into = out_ptr + first * BLOCKSIZE + at
    tl.store(into, w.to(out_ptr.dtype.element_ty), mask=at < left)


@triton.jit
def _nf4_kernel(
    codes_ptr, absmax_ptr, table_ptr, outer_ptr, nested_table_ptr, offset_ptr, out_ptr,
    COUNT, BYTES, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """W = table[code] · absmax of its block; BLOCKS blocks of BLOCKSIZE weights, flat.

    codes [BYTES] uint8, the earlier weight in the high half; absmax [COUNT / BLOCKSIZE] fp32,
    or with NESTED uint8: then absmax = nested_table[absmax] · outer + offset, where outer
    [COUNT / BLOCKSIZE / NESTED] and offset [1] are fp32. The table has 16 fp32, the nested 256.
    """
    _nf4_blocks(
        codes_ptr, absmax_ptr, table_ptr, outer_ptr, nested_table_ptr, offset_ptr, out_ptr,
        COUNT, BYTES, BLOCKSIZE, NESTED, BLOCKS,
    )  # fmt: skip


@triton.jit
def _nf4_some_kernel(
    codes_ptr, absmax_ptr, table_ptr, outer_ptr, nested_table_ptr, offset_ptr, ids_ptr, out_ptr,
    COUNT, BYTES, ABSMAX, OUTER,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The same for weights ids [g] int64 of a stack, whose tensors have a dimension more in front.

    A weight has BYTES codes, ABSMAX scales and OUTER scales of scales; out [g, COUNT].
    """
    place = tl.program_id(1).to(tl.int64)
    weight = tl.load(ids_ptr + place)
    if NESTED:
        outer_ptr += weight * OUTER
        nested_table_ptr += weight * 256
        offset_ptr += weight
    _nf4_blocks(
        codes_ptr + weight * BYTES, absmax_ptr + weight * ABSMAX, table_ptr + weight * 16,
        outer_ptr, nested_table_ptr, offset_ptr, out_ptr + place * COUNT,
        COUNT, BYTES, BLOCKSIZE, NESTED, BLOCKS,
    )  # fmt: skip


@triton.jit
def _eight_bit_kernel(
    codes_ptr, scale_ptr, out_ptr, N, K, STEP: tl.constexpr,
    FP8: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W = code · scale for BLOCK_N rows by BLOCK_K columns; codes, W [N, K].

    The codes are int8 or, with FP8, e4m3 bytes. ROWS: a scale per row [N], times STEP; else one per
    TILE×TILE weights [⌈N / TILE⌉, ⌈K / TILE⌉].
    """
    columns = tl.cdiv(K, BLOCK_K)
    pid_n, pid_k = tl.program_id(0) // columns, tl.program_id(0) % columns
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    at = offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    codes = tl.load(codes_ptr + at, mask=inside, other=0)
    values = _e4m3(codes) if FP8 else codes.to(tl.float32)
    if ROWS:
        w = values * tl.load(scale_ptr + offs_n, mask=offs_n < N)[:, None] * STEP
    else:
        tile = pid_n * BLOCK_N // TILE * tl.cdiv(K, TILE) + pid_k * BLOCK_K // TILE
        w = values * tl.load(scale_ptr + tile)
    tl.store(out_ptr + at, w.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _e4m3(codes):
    """e4m3fn bytes -> fp32, exactly, also on GPUs without the type.

    Its exponent and fraction, put where fp32 has them, are the value times 2^-120; what is
    subnormal there is subnormal here.
    """
    wide = codes.to(tl.uint32)
    bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), value)


def dequantize_nf4(
    codes: Tensor,
    absmax: Tensor,
    table: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | None,
    out: Tensor | None,
    *,
    shape: tuple[int, int],
    dtype: torch.dtype,
    blocksize: int,
    nested_blocksize: int,
) -> Tensor:
    """Return the dense weight [N, K], of the ``shape``.

    A block has ``blocksize`` weights, a power of two. ``nested`` is of the scales, which then are
    uint8: their own scales, a table [256] and an offset, for blocks of ``nested_blocksize``.
    """
    tensors = (codes, absmax, table, *(nested or (None, None, None)))
    options = (blocksize, nested_blocksize if nested else 0)
    return written(_launch_nf4, tensors, out, (shape, dtype, *options))


def dequantize_nf4_some(
    codes: Tensor,
    absmax: Tensor,
    table: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | None,
    ids: Tensor,
    out: Tensor,
    *,
    blocksize: int,
    nested_blocksize: int,
) -> None:
    """Write the weights ``ids`` [g] int64 of a stack to ``out`` [g, N, K], in one launch.

    The stored tensors are those of :func:`dequantize_nf4` with one dimension more in front.
    """
    if not len(ids):
        return
    count, blocks = out.shape[1] * out.shape[2], max(1, SPAN // blocksize)
    outer, nested_table, offset = nested or (None, None, None)
    launch(
        _nf4_some_kernel, (ceil_div(count, blocks * blocksize), len(ids)),
        codes_ptr=codes, absmax_ptr=absmax, table_ptr=table, outer_ptr=outer,
        nested_table_ptr=nested_table, offset_ptr=offset, ids_ptr=ids, out_ptr=out,
        COUNT=count, BYTES=codes.shape[1], ABSMAX=absmax.shape[1],
        OUTER=0 if outer is None else outer.shape[1],
        BLOCKSIZE=blocksize, NESTED=nested_blocksize if nested else 0, BLOCKS=blocks,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def dequantize_int8(
    codes: Tensor,
    scale: Tensor,
    out: Tensor | None,
    *,
    dtype: torch.dtype,
    step: float,
) -> Tensor:
    """Return ``(codes · scale) · step``: [N, K] int8, [N] fp32 -> [N, K]."""
    return written(_launch_eight_bit, (codes, scale), out, (codes.shape, dtype, step, False, True))


def dequantize_fp8(
    codes: Tensor, scale: Tensor, out: Tensor | None, *, dtype: torch.dtype
) -> Tensor:
    """Return ``codes · scale``: [N, K] float8_e4m3fn, a scale in fp32 by tiles or rows -> [N, K].

    ``scale`` is [⌈N / 128⌉, ⌈K / 128⌉], or [N, 1].
    """
    tensors, by_rows = (codes.view(torch.uint8), scale), [*scale.shape] == [len(codes), 1]
    return written(_launch_eight_bit, tensors, out, (codes.shape, dtype, 1.0, True, by_rows))


def written(
    function: Function,
    tensors: tuple[Tensor | None, ...],
    out: Tensor | None,
    options: tuple[Hashable, ...],
) -> Tensor:
    """Call what launches a kernel that writes a weight: into ``out``, or a new one for None."""
    if out is not None:
        function(*tensors, out, *options)
        return out
    (new,) = replayed(function, (*tensors, None), options)
    if new is None:
        raise RuntimeError("a dequantising kernel returned no weight")
    return new


def _launch_nf4(
    codes: Tensor,
    absmax: Tensor,
    table: Tensor,
    outer: Tensor | None,
    nested_table: Tensor | None,
    offset: Tensor | None,
    out: Tensor | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    blocksize: int,
    nested_blocksize: int,
) -> tuple[Tensor]:
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=codes.device)
    blocks = max(1, SPAN // blocksize)
    launch(
        _nf4_kernel, (ceil_div(out.numel(), blocks * blocksize),),
        codes_ptr=codes, absmax_ptr=absmax, table_ptr=table, outer_ptr=outer,
        nested_table_ptr=nested_table, offset_ptr=offset, out_ptr=out,
        COUNT=out.numel(), BYTES=codes.numel(),
        BLOCKSIZE=blocksize, NESTED=nested_blocksize, BLOCKS=blocks,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return (out,)


def _launch_eight_bit(
    codes: Tensor,
    scale: Tensor,
    out: Tensor | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    step: float,
    fp8: bool,
    by_rows: bool,
) -> tuple[Tensor]:
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=codes.device)
    n, k = shape
    rows = SPAN // TILE
    launch(
        _eight_bit_kernel, (ceil_div(n, rows) * ceil_div(k, TILE),),
        codes_ptr=codes, scale_ptr=scale, out_ptr=out, N=n, K=k,
        STEP=step, FP8=fp8, ROWS=by_rows, TILE=TILE, BLOCK_N=rows, BLOCK_K=TILE,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return (out,)
