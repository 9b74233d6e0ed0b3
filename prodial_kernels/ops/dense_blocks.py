"""The kernels' dense plan: diagonal blocks too large for a tile, up to P = K.

``W D_b`` is a library product then, and takes the frozen weight's place in the kernels, which are
given no blocks. Backward makes it again, and ``dU = (dY ⊙ s) W`` for the blocks' gradient.
"""

from __future__ import annotations

from torch import Tensor

from prodial_kernels.ops.diagonal import (
    block_outer_product,
    deviation,
    deviation_backward,
    rotate_weight,
)
from prodial_kernels.ops.reference import scale_of

MAX_TILED_BLOCK = 128
"""The largest P that the kernels hold in a tile."""


def is_dense(blocks: Tensor | None) -> bool:
    """Whether the blocks D_a [K / P, P, P] need the dense plan."""
    return blocks is not None and blocks.shape[-1] > MAX_TILED_BLOCK


def turned_weight(weight: Tensor, blocks: Tensor, relu: bool) -> Tensor:
    """Return ``W D_b``, [N, K]: transient, never kept for backward."""
    return rotate_weight(weight, deviation(blocks, "relu" if relu else "free"))


def dense_blocks_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    blocks: Tensor,
    scale_deviation: Tensor | None,
    relu: bool,
) -> Tensor:
    """Return dD_a, [K / P, P, P], from dY [M, N] and X [M, K]."""
    diagonal = "relu" if relu else "free"
    scaled = weight
    if scale_deviation is not None:
        scaled = (weight * scale_of(scale_deviation)[:, None]).to(weight.dtype)
    de = block_outer_product(dy @ scaled, x, blocks.shape[-1])
    return deviation_backward(de.to(blocks.dtype), blocks, diagonal)
