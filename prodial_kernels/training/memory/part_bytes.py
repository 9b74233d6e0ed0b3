"""Bytes of a block's parts beside its mixer: what they keep, and the largest moments of each.

Compared with blocks of seven hybrid models at their published dimensions on an H200 (bf16 and NF4,
1×2048; ``python -m benchmarks.training.block_memory``): what is kept agrees within 1%, what a
backward takes within 4%.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prodial_kernels.kernels.choices.tile_sizes import DeviceLimits, padded_rank
from prodial_kernels.quantization.modules.routing import GROUP_BYTES
from prodial_kernels.training.memory.block_parts import (
    AttentionShape,
    BlockParts,
    ExpertsShape,
    MlpShape,
)

_FP32 = 4
_INDEX = 8
HOPPER = DeviceLimits((9, 0), 132)
"""Of an H100 or H200, which plans are for where no device is at hand."""


@dataclass(frozen=True)
class Tokens:
    """The batch that activations are counted for.

    Attributes:
        batch: Sequences.
        length: Tokens of each.
        itemsize: Bytes of an activation in the compute dtype.
        dense_weight: Whether a projector's weight is dequantised for every product.
        everything: Whether every other linear layer's is too, and that of experts.
        in_fp8: Whether projectors multiply in fp8, by their weights as they are stored.
        limits: Of the device, by which a projector's backward chooses what it makes.
    """

    batch: int
    length: int
    itemsize: int
    dense_weight: bool = False
    everything: bool = False
    in_fp8: bool = False
    limits: DeviceLimits = HOPPER

    @property
    def count(self) -> int:
        """M."""
        return self.batch * self.length


@dataclass(frozen=True)
class Part:
    """One part of a block, in the order of the backward pass; bytes.

    Attributes:
        kept: From its forward to its backward.
        backward: Its largest moment in backward beyond what is kept, without the gradient of the
            block's output.
        forward: Its largest moment in forward beyond what is kept.
        released: What is let go before that backward's largest moment where the block has just run
            again.
    """

    kept: int
    backward: int
    forward: int
    released: int = 0


def parts_beside(parts: BlockParts, tokens: Tokens, width: int, rank: int) -> Iterator[Part]:
    """Yield the parts of a block beside its mixer, the last first.

    Args:
        parts: What they are.
        tokens: The batch.
        width: Features d of the residual stream.
        rank: Of adapters.
    """
    # A mixture's shared experts are added to what the routed ones give, so they come first.
    for mlp in reversed(parts.mlps):
        yield _mlp(mlp, tokens, width)
    if parts.experts is not None:
        yield _experts(parts.experts, tokens)
    if parts.attention is not None:
        yield _attention(parts.attention, tokens, width)
    if parts.adapted:
        yield _adapters(parts.adapted, tokens, rank)


def _attention(shape: AttentionShape, tokens: Tokens, width: int) -> Part:
    m, c = tokens.count, tokens.itemsize
    q, kv = c * m * shape.queries, c * m * shape.keys
    sums = _FP32 * m * shape.heads
    weight = c * shape.queries * width if tokens.everything else 0
    # Keys and values have as many heads as queries meanwhile.
    repeated = 2 * q if shape.keys < shape.queries else 0
    # Gradients of the output, of queries (in fp32 first), keys and values.
    attend = q + _FP32 * m * shape.queries + q + 2 * kv + repeated + sums
    return Part(2 * q + 2 * kv + sums, max(attend, q + weight), c * m * width + weight)


def _mlp(shape: MlpShape, tokens: Tokens, width: int) -> Part:
    m, c = tokens.count, tokens.itemsize
    inner = c * m * shape.inner
    weight = c * shape.inner * width if tokens.everything else 0
    # The gate, what becomes of it, and what it multiplies; else what the activation keeps.
    kept = 3 * inner if shape.gated else inner
    # The gradient of the second product's input and what the activation's backward makes of it.
    backward = (4 if shape.squares else 3 if shape.gated else 2) * inner
    # The second product's input, its weight and output, and the norm's output that was read.
    return Part(kept, max(backward, inner + weight), inner + weight + 2 * c * m * width)


def _experts(shape: ExpertsShape, tokens: Tokens) -> Part:
    m, c, mlp = tokens.count, tokens.itemsize, shape.mlp
    chosen = m * shape.chosen
    rows, inner = c * chosen * shape.width, c * chosen * mlp.inner
    wide = _FP32 if shape.fp32 else c
    # The scores of all experts twice, a mask, and the choices with their weights and places.
    router = m * shape.number * (2 * _FP32 + 1) + chosen * (wide + 3 * _INDEX)
    kept = rows + (3 if mlp.gated else 1) * inner + router
    activation = (3 if mlp.gated else 4 if mlp.squares else 2) * inner
    if not tokens.everything:
        # transformers' products by group: three tensors of the rows in the dtype of the weights.
        summed = 3 * wide * chosen * shape.width + rows + c * m * shape.width
        return Part(kept, max(summed, activation), rows + inner, rows)
    one = mlp.inner * shape.width * c
    room = min(shape.number, max(1, GROUP_BYTES // one)) * one
    group = inner * room // (one * shape.number)
    # The gradient of the sum in fp32 and two more like it, and that of the rows. Then the last
    # product's output is no more: that gradient, and of the second product's input, takes its
    # place; what the activation makes of it; and the gradient of the rows again.
    combined = rows + 3 * _FP32 * m * shape.width
    second = inner + room + group
    first = (inner if mlp.gated else 0) + room
    backward = max(combined, second, activation - rows, first)
    return Part(kept, backward, inner + room + group + c * m * shape.width)


def _adapters(shapes: tuple[tuple[int, int], ...], tokens: Tokens, rank: int) -> Part:
    m, c = tokens.count, tokens.itemsize
    outputs = sum(n + padded_rank(rank) for n, _ in shapes)
    inputs = sum({k for _, k in shapes})
    n, k = max(shapes, key=lambda shape: shape[0] * shape[1])
    # s ⊙ W, W where it is stored, and both gradients.
    work = c * n * k * (2 if tokens.everything else 1) + c * m * (n + k)
    return Part(c * m * (outputs + inputs), work, work)
