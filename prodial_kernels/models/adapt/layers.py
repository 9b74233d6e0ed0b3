"""Making the adapted layer that a configuration means for one linear layer."""

from __future__ import annotations

import torch
from torch import nn

from prodial_kernels.config import ProdialConfig
from prodial_kernels.linear import ProdialLinear, weight_like
from prodial_kernels.quantization import QuantizedLinear


def adapted_layer(
    linear: nn.Linear | QuantizedLinear, config: ProdialConfig, name: str
) -> ProdialLinear:
    """Return ``linear`` with an adapter at its initial values, where W' = W.

    The adapter is fp32, or fp64 on an fp64 weight; train or eval mode is that of ``linear``.

    Args:
        linear: Frozen and kept as ``base_layer``.
        config: The options of the adapter.
        name: The target, as ``config.n_blocks`` and ``config.block_size`` name it.

    Raises:
        ValueError: A block count that does not divide ``in_features``.
    """
    layer = ProdialLinear.from_linear(
        linear, r=config.r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
        diagonal=config.diagonal, train_scale=config.train_scale,
        train_diagonal=config.train_diagonal, impl=config.impl,
        adapter_dtype=torch.promote_types(torch.float32, weight_like(linear).dtype),
        **config.blocks_of(name),
    )  # fmt: skip
    return layer.train(linear.training)
