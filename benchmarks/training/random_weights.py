"""Random weights in the place of a checkpoint: to measure a size that nobody has to download."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from prodial_kernels.models.loading.quantized import load_into, model_on_meta
from prodial_kernels.module_tree import place
from prodial_kernels.quantization import QuantizationReport, QuantizedLinear, quantize_linear
from prodial_kernels.quantization.model import select
from prodial_kernels.quantization.modules.embedding import QuantizedEmbedding
from prodial_kernels.quantization.modules.experts import QuantizedExperts, QuantizedStack
from prodial_kernels.quantization.modules.host_experts import HostStack
from prodial_kernels.quantization.modules.selection import EVERYTHING, PROJECTORS, Selection


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
        return self.matrix(like.shape, like.dtype)

    def matrix(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Draw the weight of a linear layer, an embedding, a convolution or experts."""
        device = self._generator.device
        drawn = torch.randn(shape, generator=self._generator, dtype=dtype, device=device)
        return drawn.mul_(1 / math.sqrt(shape[1:].numel()))

    def __contains__(self, name: object) -> bool:
        """Whether the model has such a tensor; none is drawn."""
        return name in self._like

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


def random_packed(
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    format: str | None,
    modules: str = "projectors",
    *,
    experts_on_host: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """Build the same in seconds: of each shape one weight is drawn and stored, then copied.

    For time and memory, which do not depend on the values. ``modules`` is as
    ``FinetuneConfig.quantize_modules``; the others are those of :func:`random_quantized`.
    """
    model = model_on_meta(config, dtype)
    drawn = RandomWeights(model, device=device, seed=seed)
    if format is not None:
        everything = modules == EVERYTHING
        chosen = select(model, EVERYTHING if everything else PROJECTORS)
        _place_copies(model, chosen, format, device, drawn, experts_on_host)
    names = model.state_dict().keys()
    rest = {name for name, tensor in model.state_dict().items() if tensor.is_meta}
    tied = {name for name in names if name not in drawn}
    load_into(model, _Some(drawn, rest - tied), device, None, None)
    return model


class _Some(Mapping[str, Tensor]):
    """Some tensors of a checkpoint."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> None:
        self._tensors = tensors
        wanted = set(names)
        self._names = [name for name in tensors if name in wanted]

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _place_copies(
    model: nn.Module, chosen: Selection, format: str, device: torch.device, drawn: RandomWeights,
    experts_on_host: bool,
) -> None:  # fmt: skip
    """Store copies of one drawn weight of each shape in the place of what was chosen."""
    layers: dict[torch.Size, QuantizedLinear] = {}

    def copy_of(shape: torch.Size, dtype: torch.dtype, bias: Tensor | None) -> QuantizedLinear:
        if shape not in layers:
            linear = nn.Linear(1, 1, bias=False, device="meta")
            linear.weight = nn.Parameter(drawn.matrix(shape, dtype), requires_grad=False)
            layers[shape] = quantize_linear(linear, format)
        layer = layers[shape]
        new = layer.with_storage(tuple(tensor.clone() for tensor in layer.packed()))
        if bias is not None:
            new.bias = nn.Parameter(bias.new_zeros(bias.shape, device=device), requires_grad=False)
        return new

    for paths in (*chosen.linears, *(own for _, own in chosen.tied)):
        linear: Any = model.get_submodule(paths[0])
        layer = copy_of(linear.weight.shape, linear.weight.dtype, linear.bias)
        place(model, paths, layer.train(linear.training))
    for tables, own in (*chosen.tied, *((paths, None) for paths in chosen.embeddings)):
        embedding: Any = model.get_submodule(tables[0])
        table: Any = (
            copy_of(embedding.weight.shape, embedding.weight.dtype, None)
            if own is None
            else model.get_submodule(own[0])
        )
        new = QuantizedEmbedding(table, tied=own is not None, padding_idx=embedding.padding_idx)
        place(model, tables, new)
    for paths in chosen.experts:
        experts = model.get_submodule(paths[0])
        stacks = {}
        for name, weight in experts.named_parameters():
            one = copy_of(weight[0].shape, weight.dtype, None)
            kind = HostStack if experts_on_host else QuantizedStack
            stacks[name] = stack = kind(len(weight), one)
            for index in range(len(weight)):
                stack.put(index, one)
        place(model, paths, QuantizedExperts(experts, stacks))
