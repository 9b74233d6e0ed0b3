"""Channel-first [b, F, l] to token-first [b, l, F] and back, and Mamba's gate."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.choices.partition import ceil_div
from prodial_kernels.kernels.replay.recorded_calls import replayed
from prodial_kernels.kernels.replay.recorder import launch

# A tile's side: 128 bytes of a 16-bit row in both layouts.
SIDE = 64
# Elements that one program gates: of one row, or of several short ones.
SPAN = 2048


@triton.jit
def _transpose_kernel(
    x_ptr, y_ptr, ROWS, COLUMNS, stride_x_batch, stride_x_row, SIDE: tl.constexpr
):
    """Y[b] = X[b]ᵀ: X [b, ROWS, COLUMNS] with unit inner stride, Y [b, COLUMNS, ROWS] contiguous.

    A program owns a tile of one batch. All are on the grid's first axis: the others end at 65,535.
    """
    tiles_r = tl.cdiv(ROWS, SIDE)
    tiles = tiles_r * tl.cdiv(COLUMNS, SIDE)
    tile, batch = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    rows = tile % tiles_r * SIDE + tl.arange(0, SIDE)
    columns = tile // tiles_r * SIDE + tl.arange(0, SIDE)
    inside = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    at = rows.to(tl.int64)[:, None]
    x = tl.load(
        x_ptr + batch * stride_x_batch + at * stride_x_row + columns[None, :], mask=inside, other=0
    )
    at = columns.to(tl.int64)[:, None]
    into = y_ptr + batch * ROWS * COLUMNS + at * ROWS + rows[None, :]
    tl.store(into, tl.trans(x), mask=(columns < COLUMNS)[:, None] & (rows < ROWS)[None, :])


@triton.jit
def _gate_kernel(
    x_ptr, z_ptr, y_ptr, ROWS, COLUMNS, stride_x_batch, stride_x_row, stride_z_batch, stride_z_row,
    BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Y = X ⊙ silu(Z): X, Z [b, ROWS, COLUMNS] with unit inner stride, Y contiguous.

    A program owns SPAN columns of BLOCK rows of one batch.
    """
    blocks, spans = tl.cdiv(ROWS, BLOCK), tl.cdiv(COLUMNS, SPAN)
    tile, batch = tl.program_id(0) % (blocks * spans), tl.program_id(0) // (blocks * spans)
    rows = (tile // spans * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    columns = (tile % spans * SPAN + tl.arange(0, SPAN))[None, :]
    inside = (rows < ROWS) & (columns < COLUMNS)
    batch = batch.to(tl.int64)
    x = tl.load(x_ptr + batch * stride_x_batch + rows * stride_x_row + columns, mask=inside)
    z = tl.load(z_ptr + batch * stride_z_batch + rows * stride_z_row + columns, mask=inside)
    wide = z.to(tl.float32)
    gated = (x.to(tl.float32) * wide * tl.sigmoid(wide)).to(x.dtype)
    tl.store(y_ptr + (batch * ROWS + rows) * COLUMNS + columns, gated, mask=inside)


def launch_transpose(x: Tensor) -> Tensor:
    """Return ``x.mT``, contiguous; x [b, rows, columns]."""
    (y,) = replayed(_transpose, (x,), ())
    return y


def launch_gate(x: Tensor, z: Tensor) -> Tensor:
    """Return ``x * silu(z)``, contiguous; x, z [b, rows, columns]."""
    (y,) = replayed(_gate, (x, z), ())
    return y


def _transpose(x: Tensor) -> tuple[Tensor]:
    batch, rows, columns = x.shape
    y = torch.empty(batch, columns, rows, device=x.device, dtype=x.dtype)
    if y.numel() != 0:
        launch(
            _transpose_kernel, (batch * ceil_div(rows, SIDE) * ceil_div(columns, SIDE),),
            x_ptr=x, y_ptr=y, ROWS=rows, COLUMNS=columns,
            stride_x_batch=x.stride(0), stride_x_row=x.stride(1), SIDE=SIDE, num_warps=4,
        )  # fmt: skip
    return (y,)


def _gate(x: Tensor, z: Tensor) -> tuple[Tensor]:
    batch, rows, columns = x.shape
    y = torch.empty(batch, rows, columns, device=x.device, dtype=x.dtype)
    if y.numel() != 0:
        span = min(SPAN, triton.next_power_of_2(columns))
        block = SPAN // span
        launch(
            _gate_kernel, (batch * ceil_div(rows, block) * ceil_div(columns, span),),
            x_ptr=x, z_ptr=z, y_ptr=y, ROWS=rows, COLUMNS=columns,
            stride_x_batch=x.stride(0), stride_x_row=x.stride(1),
            stride_z_batch=z.stride(0), stride_z_row=z.stride(1),
            BLOCK=block, SPAN=span, num_warps=4,
        )  # fmt: skip
    return (y,)
