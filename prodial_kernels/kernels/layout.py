"""Channel-first [b, F, l] to token-first [b, l, F] and back, and Mamba's gate."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.recorder import launch
from prodial_kernels.kernels.sharing import ceil_div
from prodial_kernels.kernels.taped import taped

# A tile's side: 128 bytes of a 16-bit row in both layouts.
SIDE = 64
# Elements of a row that one program gates.
SPAN = 2048


@triton.jit
def _transpose_kernel(
    x_ptr, y_ptr, ROWS, COLUMNS, stride_x_batch, stride_x_row, SIDE: tl.constexpr
):
    """Y[b] = X[b]ᵀ: X [b, ROWS, COLUMNS] with unit inner stride, Y [b, COLUMNS, ROWS] contiguous.

    A program owns a tile of one batch; the batch is the grid's second axis.
    """
    tiles = tl.cdiv(ROWS, SIDE)
    tile, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = tile % tiles * SIDE + tl.arange(0, SIDE)
    columns = tile // tiles * SIDE + tl.arange(0, SIDE)
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
    SPAN: tl.constexpr,
):  # fmt: skip
    """Y = X ⊙ silu(Z): X, Z [b, ROWS, COLUMNS] with unit inner stride, Y contiguous.

    A program owns SPAN elements of one row of one batch; the batch is the grid's second axis.
    """
    spans = tl.cdiv(COLUMNS, SPAN)
    row, batch = tl.program_id(0) // spans, tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) % spans * SPAN + tl.arange(0, SPAN)
    inside = columns < COLUMNS
    at = row.to(tl.int64)
    x = tl.load(x_ptr + batch * stride_x_batch + at * stride_x_row + columns, mask=inside)
    z = tl.load(z_ptr + batch * stride_z_batch + at * stride_z_row + columns, mask=inside)
    wide = z.to(tl.float32)
    gated = (x.to(tl.float32) * wide * tl.sigmoid(wide)).to(x.dtype)
    tl.store(y_ptr + (batch * ROWS + at) * COLUMNS + columns, gated, mask=inside)


def launch_transpose(x: Tensor) -> Tensor:
    """Return ``x.mT``, contiguous; x [b, rows, columns]."""
    (y,) = taped(_transpose, (x,), ())
    return y


def launch_gate(x: Tensor, z: Tensor) -> Tensor:
    """Return ``x * silu(z)``, contiguous; x, z [b, rows, columns]."""
    (y,) = taped(_gate, (x, z), ())
    return y


def _transpose(x: Tensor) -> tuple[Tensor]:
    batch, rows, columns = x.shape
    y = torch.empty(batch, columns, rows, device=x.device, dtype=x.dtype)
    if y.numel() != 0:
        launch(
            _transpose_kernel, (ceil_div(rows, SIDE) * ceil_div(columns, SIDE), batch),
            x, y, rows, columns, x.stride(0), x.stride(1), SIDE=SIDE, num_warps=4,
        )  # fmt: skip
    return (y,)


def _gate(x: Tensor, z: Tensor) -> tuple[Tensor]:
    batch, rows, columns = x.shape
    y = torch.empty(batch, rows, columns, device=x.device, dtype=x.dtype)
    if y.numel() != 0:
        span = min(SPAN, triton.next_power_of_2(columns))
        launch(
            _gate_kernel, (rows * ceil_div(columns, span), batch),
            x, z, y, rows, columns, x.stride(0), x.stride(1), z.stride(0), z.stride(1),
            SPAN=span, num_warps=4,
        )  # fmt: skip
    return (y,)
