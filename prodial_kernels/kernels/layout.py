"""Channel-first [b, F, l] to token-first [b, l, F] and back, gated on the way where asked."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.launch import ceil_div

# A tile's side: 128 bytes of a 16-bit row in both layouts.
SIDE = 64


@triton.jit
def _transpose_kernel(
    x_ptr, z_ptr, y_ptr, ROWS, COLUMNS, stride_x_batch, stride_x_row, stride_z_batch, stride_z_row,
    GATE: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Y[b] = X[b]ᵀ, or (X[b] ⊙ silu(Z[b]))ᵀ.

    X, Z [b, ROWS, COLUMNS] with unit inner stride, Y [b, COLUMNS, ROWS] contiguous. A program owns
    a tile of one batch; the batch is the grid's second axis.
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
    if GATE:
        z = tl.load(
            z_ptr + batch * stride_z_batch + at * stride_z_row + columns[None, :],
            mask=inside,
            other=0,
        ).to(tl.float32)
        x = (x.to(tl.float32) * z * tl.sigmoid(z)).to(x.dtype)
    at = columns.to(tl.int64)[:, None]
    into = y_ptr + batch * ROWS * COLUMNS + at * ROWS + rows[None, :]
    tl.store(into, tl.trans(x), mask=(columns < COLUMNS)[:, None] & (rows < ROWS)[None, :])


def launch_transpose(x: Tensor, z: Tensor | None = None) -> Tensor:
    """Return ``x.mT``, or ``(x * silu(z)).mT``, contiguous; x, z [b, rows, columns]."""
    batch, rows, columns = x.shape
    y = torch.empty(batch, columns, rows, device=x.device, dtype=x.dtype)
    if y.numel() == 0:
        return y
    gate = x if z is None else z
    _transpose_kernel[(ceil_div(rows, SIDE) * ceil_div(columns, SIDE), batch)](
        x, gate, y, rows, columns, x.stride(0), x.stride(1), gate.stride(0), gate.stride(1),
        GATE=z is not None, SIDE=SIDE, num_warps=4,
    )  # fmt: skip
    return y
