"""What stored weights come to: how many there are, and the bytes that they take."""

from __future__ import annotations

from torch import nn

from prodial_kernels.kernels.choices.partition import ceil_div
from prodial_kernels.quantization.fp8 import TILE
from prodial_kernels.quantization.modules.embedding import QuantizedEmbedding
from prodial_kernels.quantization.modules.experts import QuantizedStack
from prodial_kernels.quantization.nf4 import BLOCKSIZE, NESTED_BLOCKSIZE, NF4_TABLE


def stored_elements(model: nn.Module) -> int:
    """Return how many weights embeddings and experts store; a table tied to a head not."""
    total = 0
    for module in model.modules():
        if isinstance(module, QuantizedStack):
            total += module.count * module.out_features * module.in_features
        elif isinstance(module, QuantizedEmbedding) and not module.tied:
            total += module.num_embeddings * module.embedding_dim
    return total


def stored_bytes(format: str, n: int, k: int, count: int = 1) -> int:
    """Return what ``count`` weights [n, k] take in a format, scales and tables included.

    ValueError for an unknown format.
    """
    if format == "nf4":
        blocks = ceil_div(n * k, BLOCKSIZE)
        scales = blocks + 4 * ceil_div(blocks, NESTED_BLOCKSIZE)
        one = ceil_div(n * k, 2) + scales + 4 * (len(NF4_TABLE) + 256 + 1)
    elif format == "int8":
        one = n * k + 4 * n
    elif format == "fp8":
        one = n * k + 4 * ceil_div(n, TILE) * ceil_div(k, TILE)
    else:
        raise ValueError(f"format must be nf4, int8 or fp8, got {format!r}")
    return count * one


def host_bytes(format: str, n: int, k: int) -> int:
    """Return what of a weight [n, k] a ``HostStack`` keeps in the host's memory."""
    codes = ceil_div(n * k, 2) if format == "nf4" else n * k
    return codes + (ceil_div(n * k, BLOCKSIZE) if format == "nf4" else 0)
