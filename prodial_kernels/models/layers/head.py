"""The head of a language model by itself: hidden states out of the model, logits a few at a time.

A causal language model multiplies hidden states [b, l, d] by its head [vocabulary, d] and may scale
the product (Granite divides it, FalconH1 multiplies it). To work on few logits at a time, the model
is run with its head replaced, for that one call, by a function that notes its input. So whatever
the model does before its head stays the model's own, and no table of architectures is needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prodial_kernels.models.layers.attention_masks import masks_without_waiting
from prodial_kernels.module_tree import has_hooks
from prodial_kernels.quantization import QuantizedLinear

# What the head is made to return once, to see what the model does to it.
_PROBE = (0.0, 1.0, -2.0, 64.0)
# Short, but of a length that every scan kernel takes.
_PROBE_LENGTH = 8

PART_ELEMENTS = 2**24
"""Of a stored head that are dense at a time: 32 MiB in 16 bits, enough for a product."""


class HeadError(ValueError):
    """The logits of a model cannot be computed apart from its forward."""


@dataclass(frozen=True)
class OutputHead:
    """A model's head: ``logits = scale · (hidden Wᵀ + bias)``.

    Attributes:
        model: The causal language model.
        layer: Its last layer, W [vocabulary, d].
        scale: What the model multiplies the layer's output by.
    """

    model: nn.Module
    layer: nn.Linear | QuantizedLinear
    scale: float

    def hidden(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Run the model up to its head: [b, l] -> [b, l, d], in the dtype the head is given."""
        return _run_to_head(self.model, self.layer, input_ids, None, **inputs)[0]

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """W [vocabulary, d], dense on a quantised layer, and the bias [vocabulary] or None.

        In the dtype that the model multiplies in.
        """
        weight, bias = self.layer.weight, self.layer.bias
        device = weight.device.type
        if torch.is_autocast_enabled(device):
            weight = weight.to(torch.get_autocast_dtype(device))
        return weight, None if bias is None else bias.to(weight.dtype)

    def matrix(self) -> tuple[Tensor | StoredMatrix, Tensor | None]:
        """The same, but a quantised layer's W as it is stored: to be made dense in parts."""
        if not isinstance(self.layer, QuantizedLinear):
            return self.operands()
        matrix, bias = StoredMatrix(self.layer), self.layer.bias
        return matrix, None if bias is None else bias.to(matrix.dtype)


class StoredMatrix:
    """A quantised head's W [vocabulary, d] for products with a few rows of it at a time."""

    def __init__(self, layer: QuantizedLinear) -> None:
        """Take the stored weight of ``layer``, and the dtype that a model multiplies in."""
        self._layer = layer
        self.shape = (layer.out_features, layer.in_features)
        self.device = layer.device
        kind = layer.device.type
        autocast = torch.is_autocast_enabled(kind)
        self.dtype = torch.get_autocast_dtype(kind) if autocast else layer.dtype

    def __len__(self) -> int:
        """Rows."""
        return self.shape[0]

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of W with where they are: dense, in memory that the next ones take over."""
        multiple = self._layer.row_multiple
        rows = max(1, PART_ELEMENTS // self.shape[1] // multiple) * multiple
        room = torch.empty(
            min(rows, len(self)), self.shape[1], dtype=self.dtype, device=self.device
        )
        for start in range(0, len(self), rows):
            stop = min(start + rows, len(self))
            yield slice(start, stop), self._layer.part(start, stop).dequantize(room[: stop - start])


def find_head(model: nn.Module) -> OutputHead:
    """Find the head of a model of transformers or mamba_ssm and how the model scales its output.

    The model runs once, on eight tokens, without gradients. HeadError says why where there is no
    head that can be taken out.
    """
    layer = _last_layer(model)
    ids, values = _probe(next(model.parameters()).device)
    with torch.no_grad(), eval_mode(model):
        _, output = _run_to_head(model, layer, ids, values.view(1, 1, -1))
    return OutputHead(model, layer, _factor(model, layer, output, values))


def head_obstacle(model: nn.Module) -> str | None:
    """Say why :func:`find_head` will raise for a model, told without its weights; None if it won't.

    Of a model on the ``meta`` device only what lies behind its base model runs: what other models'
    blocks do may depend on values. Where even that needs them, the answer is None, and
    :func:`find_head` tells when the weights are there.
    """
    try:
        if not next(model.parameters()).is_meta:
            find_head(model)
            return None
        layer = _last_layer(model)
        base = getattr(model, "base_model", model)
        if base is model:
            return None
        ids, values = _probe(torch.device("cpu"))
        hidden = torch.zeros(1, _PROBE_LENGTH, layer.in_features, device="meta")
        with (
            torch.no_grad(),
            eval_mode(model),
            _forward(base, lambda *_, **__: _BaseOutput(hidden)),
        ):
            # Left on the CPU, so that what the model makes of them can be read.
            _, output = _run_to_head(model, layer, ids, values.view(1, 1, -1))
        _factor(model, layer, output, values)
    except HeadError as error:
        return str(error)
    # Any model's own code, which asked more of its base model's output than there is.
    except Exception:
        return None
    return None


def run_model(model: nn.Module, input_ids: Tensor, **inputs: Any) -> Any:
    """Call a causal language model without a cache."""
    named = "use_cache" in inspect.signature(model.forward).parameters
    # mamba_ssm's models would hand it to their mixers.
    if named or hasattr(model, "get_output_embeddings"):
        inputs["use_cache"] = False
    with masks_without_waiting(inputs):
        return model(input_ids=input_ids, **inputs)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # train() first, for modules that act on the change of mode; then each one's own mode,
        # since parts of a model may have been in eval mode before.
        model.train(modes[0][1])
        for module, mode in modes:
            module.training = mode


class _BaseOutput:
    """Hidden states, as whatever class of output a base model has; all else in it is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


def _probe(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids to run a model on, and what its head is to return."""
    # In fp64, or the factor would be rounded to the model's dtype.
    values = torch.tensor(_PROBE, device=device, dtype=torch.float64)
    return torch.zeros(1, _PROBE_LENGTH, dtype=torch.int64, device=device), values


def _factor(model: nn.Module, layer: nn.Module, output: Any, values: Tensor) -> float:
    """What a model multiplies its head's ``values`` by; HeadError where it does more to them."""
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.numel() != values.numel():
        raise HeadError(
            f"{type(model).__name__} does not return what its head {type(layer).__name__} gives as "
            "output.logits"
        )
    logits = logits.flatten().to(values)
    scale = float(logits[1])
    if not torch.allclose(logits, scale * values, rtol=1e-5, atol=0) or scale == 0:
        pairs = ", ".join(f"{x:g} -> {y:.4g}" for x, y in zip(_PROBE, logits.tolist(), strict=True))
        raise HeadError(
            f"{type(model).__name__} changes its logits by more than a factor ({pairs}), such as a "
            "soft cap"
        )
    return scale


def _last_layer(model: nn.Module) -> nn.Linear | QuantizedLinear:
    getter = getattr(model, "get_output_embeddings", None)
    layer = getter() if getter is not None else getattr(model, "lm_head", None)
    if layer is None:
        raise HeadError(
            f"{type(model).__name__} names no head: it has neither get_output_embeddings() nor "
            "lm_head"
        )
    # Not by its class: one that is trained through masters has another, and the same forward.
    plain = type(layer).forward is nn.Linear.forward or isinstance(layer, QuantizedLinear)
    if not plain or "forward" in vars(layer):
        raise HeadError(
            f"the head of {type(model).__name__} is a {type(layer).__name__}, not a plain "
            "nn.Linear: an adapter or another wrapper acts on the logits there"
        )
    if has_hooks(layer):
        raise HeadError(f"the head of {type(model).__name__} has hooks, which act on the logits")
    return layer


def _run_to_head(
    model: nn.Module, layer: nn.Module, input_ids: Tensor, answer: Tensor | None, **inputs: Any
) -> tuple[Tensor, Any]:
    """Run the model with ``layer`` returning ``answer``; return the layer's input and the output.

    HeadError unless the model calls its head exactly once.
    """
    seen: list[Tensor] = []

    def note(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden.new_zeros(1, 1, 1) if answer is None else answer

    with _forward(layer, note), _described(layer):
        output = run_model(model, input_ids, **inputs)
    if len(seen) != 1:
        raise HeadError(
            f"{type(model).__name__} called its head {len(seen)} times in a forward pass"
        )
    return seen[0], output


@contextmanager
def _described(layer: nn.Module) -> Iterator[None]:
    """Let a model read a stored head's dtype off its weight, as Mamba's do, without making that."""
    if not isinstance(layer, QuantizedLinear):
        yield
        return
    layer.only_described = True
    try:
        yield
    finally:
        layer.only_described = False


@contextmanager
def _forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Let a module without hooks be another function for a while."""
    vars(module)["forward"] = function
    try:
        yield
    finally:
        del vars(module)["forward"]
