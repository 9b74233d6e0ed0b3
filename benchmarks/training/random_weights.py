"""Random weights in the place of a checkpoint: to measure a size that nobody has to download."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from prodial_kernels.models.loading.quantized import load_into, model_on_meta
from prodial_kernels.quantization import QuantizationReport


class RandomWeights(Mapping[str, Tensor]):
    """A checkpoint for :func:`load_quantized` that draws each tensor when it is asked for.

    Linear layers, embeddings and convolutions get the variance that keeps activations of order
    one; A, D, the step size's bias and norms start as Mamba's do.
    """

    def __init__(self, model: nn.Module, *, device: torch.device | str, seed: int = 0) -> None:
        """Take names, shapes and dtypes from ``model``, which may be on the meta device.

        Args:
            model: What the weights are for.
            device: Where they are drawn; where they are loaded to, so that nothing is copied.
            seed: Of the draw.
        """
        self._like = model.state_dict()
        self._generator = torch.Generator(device).manual_seed(seed)

    def __getitem__(self, name: str) -> Tensor:
        """Draw one tensor; a second time it is another draw."""
        like = self._like[name]
        device, leaf = self._generator.device, name.rpartition(".")[2]

        def full(value: float) -> Tensor:
            return torch.full(like.shape, value, dtype=like.dtype, device=device)

        if leaf == "A_log":
            states = torch.arange(1, like.shape[-1] + 1, device=device, dtype=torch.float32)
            return states.log().to(like.dtype).expand(like.shape)
        if leaf == "dt_bias" or name.endswith("dt_proj.bias"):
            return full(math.log(math.expm1(0.01)))
        if not like.is_floating_point() or leaf == "bias":
            return full(0)
        if like.ndim < 2:
            return full(1)
        drawn = torch.randn(like.shape, generator=self._generator, dtype=like.dtype, device=device)
        return drawn.mul_(1 / math.sqrt(like[0].numel()))

    def __iter__(self) -> Iterator[str]:
        """Names of the model's state dict."""
        return iter(self._like)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._like)


def random_quantized(
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    format: str | None,
    *,
    seed: int = 0,
) -> tuple[PreTrainedModel, QuantizationReport]:
    """Build a model of a size with random weights, to measure without a checkpoint.

    Args:
        config: The model's.
        device: Where to put it; each weight is drawn there, quantised and dropped.
        dtype: Of the dense weights.
        format: Of the projectors; None leaves them dense.
        seed: Of the draw.
    """
    model = model_on_meta(config, dtype)
    tensors = RandomWeights(model, device=device, seed=seed)
    return model, load_into(model, tensors, device, format, None)
