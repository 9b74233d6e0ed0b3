"""The product of two matrices in fp8 on Hopper, written in Gluon: scaling beside multiplying.

A tensor core's sums of 128 columns have to be scaled and added up by other units. In ``product.py``
a program waits for the one and then does the other, and only its neighbour on the multiprocessor
fills the time; two such programs read about all that L2 delivers (64×128 tiles: 10 TB/s by count).
Here one program of 128×128 tiles keeps a product under way at all times: while group k + 1 is
multiplied, group k is scaled, and while a tile begins, the one before is finished and stored.
Triton's own pipelining waits for a product before its result is read, whatever stands between.
"""

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from prodial_kernels.kernels.choices.partition import ceil_div
from prodial_kernels.kernels.choices.tile_sizes import DeviceLimits
from prodial_kernels.kernels.fp8.library import pipelined_unroll
from prodial_kernels.kernels.fp8.quantize import GROUP, Rounded
from prodial_kernels.kernels.projector.tiles import swizzled_tile
from prodial_kernels.kernels.replay.recorder import launch

# A tile's rows and columns, and those of the operands' tiles.
SIDE = 128

# As they are called since Triton 3.9, and before.
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


class PipelinedTile(NamedTuple):
    """Compile-time sizes of ``_pipelined_product_kernel``.

    Attributes:
        stages: Groups of both operands that shared memory holds.
        unroll: Groups without a gap between their products; it divides all groups and is even.
        group_m: Row tiles that share L2.
        rank: R_PAD, the padded rank.
    """

    stages: int
    unroll: int
    group_m: int
    rank: int


@gluon.jit
def _place(tile, tiles, columns, SIDE: gl.constexpr, GROUP_M: gl.constexpr):
    """Tile number -> its first row and column, GROUP_M row tiles deep so that L2 is reused."""
    tile_m, tile_n = swizzled_tile(tile, tiles // columns, columns, GROUP_M)
    return tile_m * SIDE, tile_n * SIDE


@gluon.jit
def _load_group(stages, slot, ahead, groups, tiles, columns, TILE: gl.constexpr):
    """Load the next group of both operands into ``slot``, which every warp has read.

    ``ahead``: (tile, group, row, column) of what comes next; returned as it is afterwards.
    """
    left, right, lefts, rights, left_loaded, right_loaded = stages
    tile, group, row, column = ahead
    SIDE: gl.constexpr = lefts.shape[1]
    GROUP: gl.constexpr = lefts.shape[2]
    there = tile < tiles
    _barrier()
    # A set of barriers an operand: between uses of one set the compiler puts its own.
    mbarrier.expect(left_loaded.index(slot), SIDE * GROUP, pred=there)
    mbarrier.expect(right_loaded.index(slot), SIDE * GROUP, pred=there)
    _async_load(left, [row, group * GROUP], left_loaded.index(slot), lefts.index(slot), there)
    _async_load(right, [column, group * GROUP], right_loaded.index(slot), rights.index(slot), there)
    group += 1
    if group == groups:
        group = 0
        tile += gl.num_programs(0)
        row, column = _place(tile, tiles, columns, SIDE, TILE.group_m)
    return tile, group, row, column


@gluon.jit
def _multiply(stages, turn, spent, scales, group, TILE: gl.constexpr):
    """Begin a group's product in the registers of ``spent``; load its scales.

    ``turn``: (slot, phase) of the group before; returned as they are now.
    """
    _, _, lefts, rights, left_loaded, right_loaded = stages
    left_ptr, left_stride, right_ptr, right_stride, inside = scales
    slot, phase = turn
    slot += 1
    phase = gl.where(slot == TILE.stages, phase ^ 1, phase)
    slot = gl.where(slot == TILE.stages, 0, slot)
    mbarrier.wait(left_loaded.index(slot), phase)
    mbarrier.wait(right_loaded.index(slot), phase)
    right = rights.index(slot).permute((1, 0))
    part = warpgroup_mma(lefts.index(slot), right, spent, use_acc=False, is_async=True)
    left_scale = gl.load(left_ptr + group * left_stride, mask=inside, other=0.0)
    right_scale = gl.load(right_ptr + group * right_stride)
    # Multiplied by each other where they are used: here that would wait for memory.
    return part, (left_scale, right_scale), (slot, phase)


@gluon.jit
def _scaled(part, scale):
    left_scale, right_scale = scale
    return part * (left_scale * right_scale)[:, None]


@gluon.jit
def _rest_of_pass(
    acc, even, part, scale, first, stages, turn, scales, ahead, groups, tiles, columns,
    TILE: gl.constexpr,
):  # fmt: skip
    """Add what is left of a pass whose group 0 is in ``acc`` and whose group 1 is under way."""
    UNROLL: gl.constexpr = TILE.unroll
    # Loads, which hold a branch, stand between a sum and the product that takes its registers:
    # otherwise the sum is moved behind that, and the registers are copied.
    for u in gl.static_range(2, UNROLL, 2):
        even_part, even_scale, turn = _multiply(stages, turn, even, scales, first + u, TILE)
        odd = warpgroup_mma_wait(1, (part,))
        acc += _scaled(odd, scale)
        ahead = _load_group(stages, _back(turn, 1, TILE), ahead, groups, tiles, columns, TILE)
        part, scale, turn = _multiply(stages, turn, odd, scales, first + u + 1, TILE)
        even = warpgroup_mma_wait(1, (even_part,))
        acc += _scaled(even, even_scale)
        ahead = _load_group(stages, _back(turn, 1, TILE), ahead, groups, tiles, columns, TILE)
    odd = warpgroup_mma_wait(0, (part,))
    acc += _scaled(odd, scale)
    ahead = _load_group(stages, _back(turn, 0, TILE), ahead, groups, tiles, columns, TILE)
    return acc, even, odd, turn, ahead


@gluon.jit
def _back(turn, steps: gl.constexpr, TILE: gl.constexpr):
    """The slot of the turn so many steps before."""
    slot, _ = turn
    return gl.where(slot < steps, slot + TILE.stages - steps, slot - steps)


@gluon.jit
def _begin_end(acc, added, ADDS: gl.constexpr, num_warps: gl.constexpr):
    """Begin to add L Oᵀ to a tile."""
    # As products of 16 bits have their sums: every element is where it was.
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 128, 16])
    lows, outers, _ = added
    acc = gl.convert_layout(acc, SUMS, assert_trivial=True)
    if ADDS:
        acc = warpgroup_mma(lows, outers.permute((1, 0)), acc, is_async=True)
    return acc


@gluon.jit
def _store(y, out, ended, row, column):
    """Store a tile by way of ``out``, from which the copy engine takes it."""
    tma.store_wait(0)
    _barrier()
    out.store(ended.to(out.dtype))
    fence_async_shared()
    _barrier()
    _async_store(y, [row, column], out)


@gluon.jit
def _pipelined_product_kernel(
    left, right, left_scale_ptr, right_scale_ptr, deviation_ptr, low_ptr, outer_ptr, y,
    M, N, K, R, alpha, stride_left_scale, stride_right_n, stride_right_k,
    GROUP: gl.constexpr, TILE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Y = s ⊙ (X V) (+ L Oᵀ), operands as in product.py; K is a multiple of UNROLL groups.

    A program owns [SIDE, SIDE] tiles of Y, one after another.
    """
    SIDE: gl.constexpr = y.block_type.shape[0]
    UNROLL: gl.constexpr = TILE.unroll
    STAGES: gl.constexpr = TILE.stages
    R_PAD: gl.constexpr = TILE.rank
    ADDS: gl.constexpr = outer_ptr is not None
    SCALES: gl.constexpr = deviation_ptr is not None
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 128, 32])
    # Of a [SIDE, R_PAD] tile eight elements a thread, of a line one.
    FLAT: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // R_PAD, R_PAD // 8], [num_warps, 1], [1, 0]
    )
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    LOW: gl.constexpr = gl.NVMMASharedLayout(2 * R_PAD, element_bitwidth=16, rank=2)

    out = gl.allocate_shared_memory(y.dtype, [SIDE, SIDE], y.layout)
    left_loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    right_loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(left_loaded.index(i), count=1)
        mbarrier.init(right_loaded.index(i), count=1)
    lefts = gl.allocate_shared_memory(left.dtype, [STAGES, SIDE, GROUP], left.layout)
    rights = gl.allocate_shared_memory(right.dtype, [STAGES, SIDE, GROUP], right.layout)
    stages = (left, right, lefts, rights, left_loaded, right_loaded)
    lows = gl.allocate_shared_memory(y.dtype, [SIDE, R_PAD], LOW)
    outers = gl.allocate_shared_memory(y.dtype, [SIDE, R_PAD], LOW)
    factors = gl.allocate_shared_memory(gl.float32, [SIDE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    added = (lows, outers, factors)

    columns = gl.cdiv(N, SIDE)
    tiles = gl.cdiv(M, SIDE) * columns
    groups = K // GROUP
    rows = gl.arange(0, SIDE, gl.SliceLayout(1, SUMS))
    flat = gl.arange(0, SIDE, gl.SliceLayout(1, FLAT))[:, None]
    flat_r = gl.arange(0, R_PAD, gl.SliceLayout(0, FLAT))[None, :]
    line = gl.arange(0, SIDE, LINE)
    row, column = _place(gl.program_id(0), tiles, columns, SIDE, TILE.group_m)
    # Loads run STAGES groups ahead of products, into the next tiles too.
    ahead = (gl.program_id(0), 0, row, column)
    for i in gl.static_range(STAGES):
        ahead = _load_group(stages, i, ahead, groups, tiles, columns, TILE)
    turn = (-1, 0)
    even = gl.zeros([SIDE, SIDE], gl.float32, SUMS)
    odd = gl.zeros([SIDE, SIDE], gl.float32, SUMS)
    acc = gl.zeros([SIDE, SIDE], gl.float32, SUMS)
    # There is no tile before the first: outside, where nothing is stored.
    ended_row = gl.cdiv(M, SIDE) * SIDE
    ended_column = 0

    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        inside = row + rows < M
        scales = (
            left_scale_ptr + row + rows, stride_left_scale,
            right_scale_ptr + (column // GROUP) * stride_right_n, stride_right_k, inside,
        )  # fmt: skip
        # What this tile's end takes is on its way while the end of the one before is computed.
        if ADDS:
            low = gl.load(
                low_ptr + (row + flat) * R_PAD + flat_r, mask=row + flat < M, other=0.0
            )  # fmt: skip
            outer = gl.load(
                outer_ptr + (column + flat) * R + flat_r,
                mask=(column + flat < N) & (flat_r < R), other=0.0,
            )  # fmt: skip
        if SCALES:
            deviation = gl.load(deviation_ptr + column + line, mask=column + line < N, other=0.0)
        ending = _begin_end(acc, added, ADDS, num_warps)
        part, scale, turn = _multiply(stages, turn, even, scales, 0, TILE)
        next_part, next_scale, turn = _multiply(stages, turn, odd, scales, 1, TILE)
        if ADDS:
            ending = warpgroup_mma_wait(2, (ending,))
        _store(y, out, ending, ended_row, ended_column)
        if ADDS:
            lows.store(low)
            outers.store((outer.to(gl.float32) * alpha).to(y.dtype))
        if SCALES:
            factors.store(1 + deviation.to(gl.float32))
        fence_async_shared()
        even = warpgroup_mma_wait(1, (part,))
        acc = _scaled(even, scale)
        ahead = _load_group(stages, _back(turn, 1, TILE), ahead, groups, tiles, columns, TILE)
        acc, even, odd, turn, ahead = _rest_of_pass(
            acc, even, next_part, next_scale, 0, stages, turn, scales, ahead, groups, tiles,
            columns, TILE,
        )  # fmt: skip
        # Across passes of this loop ptxas would let every product wait for its end (its C7514), so
        # that none goes on from one to the next.
        for first in range(UNROLL, groups, UNROLL):
            part, scale, turn = _multiply(stages, turn, even, scales, first, TILE)
            next_part, next_scale, turn = _multiply(stages, turn, odd, scales, first + 1, TILE)
            even = warpgroup_mma_wait(1, (part,))
            acc += _scaled(even, scale)
            ahead = _load_group(stages, _back(turn, 1, TILE), ahead, groups, tiles, columns, TILE)
            acc, even, odd, turn, ahead = _rest_of_pass(
                acc, even, next_part, next_scale, first, stages, turn, scales, ahead, groups, tiles,
                columns, TILE,
            )  # fmt: skip
        if SCALES:
            acc *= factors.load(gl.SliceLayout(0, SUMS))[None, :]
        ended_row = row
        ended_column = column
        row, column = _place(tile + gl.num_programs(0), tiles, columns, SIDE, TILE.group_m)

    ending = _begin_end(acc, added, ADDS, num_warps)
    if ADDS:
        ending = warpgroup_mma_wait(0, (ending,))
    _store(y, out, ending, ended_row, ended_column)
    tma.store_wait(0)
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(left_loaded.index(i))
        mbarrier.invalidate(right_loaded.index(i))


class PipelinedConfig(NamedTuple):
    """Tile sizes and launch options of :func:`launch_pipelined_product`."""

    unroll: int
    programs: int
    stages: int = 5
    group_m: int = 8
    num_warps: int = 8


def choose_pipelined(k: int, limits: DeviceLimits) -> PipelinedConfig:
    """Return the tile sizes for operands of k columns."""
    return PipelinedConfig(pipelined_unroll(k), limits.processors)


def launch_pipelined_product(
    x: Rounded,
    codes: Tensor,
    scale_inv: Tensor,
    y: Tensor,
    *,
    config: PipelinedConfig,
    scale_deviation: Tensor | None = None,
    low: Tensor | None = None,
    outer: Tensor | None = None,
    alpha: float = 1.0,
) -> None:
    """Write Y = s ⊙ (X V) + L (α B)ᵀ to ``y``, [M, N] of 16 bits and contiguous.

    As ``product.launch_product``, without a bias, for whole groups and tiles of columns.

    Args:
        x: X [M, K], K a multiple of 128 times ``config.unroll``.
        codes: Vᵀ [N, K] float8_e4m3fn, contiguous; N a multiple of 128.
        scale_inv: Its scales, [N / 128, K / 128] fp32.
        y: Written.
        config: Tile sizes.
        scale_deviation: s − 1, [N].
        low: L, [M, R_PAD], R_PAD 16 or 32; with ``outer``, or neither.
        outer: B, [N, R].
        alpha: α.
    """
    (m, k), n = x.codes.shape, codes.shape[0]
    tiles = ceil_div(m, SIDE) * ceil_div(n, SIDE)
    stride_n, stride_k = scale_inv.stride()
    launch(
        _pipelined_product_kernel, (min(tiles, config.programs),),
        left=_tiled(x.codes), right=_tiled(codes), left_scale_ptr=x.scales,
        right_scale_ptr=scale_inv, deviation_ptr=scale_deviation, low_ptr=low, outer_ptr=outer,
        y=_tiled(y), M=m, N=n, K=k, R=0 if outer is None else outer.shape[1], alpha=alpha,
        stride_left_scale=x.scales.stride(0), stride_right_n=stride_n, stride_right_k=stride_k,
        GROUP=GROUP, TILE=PipelinedTile(
            config.stages, config.unroll, config.group_m, 16 if low is None else low.shape[1]
        ),
        num_warps=config.num_warps,
    )  # fmt: skip


def _tiled(matrix: Tensor) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(128, element_bitwidth=8 * matrix.element_size(), rank=2)
    sizes = list(matrix.shape), list(matrix.stride())
    return TensorDescriptor(matrix, *sizes, [SIDE, SIDE], layout)
