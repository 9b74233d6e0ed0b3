"""``chunk_loss``: a transformers model's own ``model(labels=...).loss`` without whole logits.

The model's forward runs as it is, with two things replaced for the call: its head notes what it is
given, and its loss function is the chunked cross-entropy of that. So whatever else a model adds to
its loss, such as a router's, is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prodial_kernels.models.adapt.names import without_peft
from prodial_kernels.models.layers.blocks import Calling, SetAttribute
from prodial_kernels.models.layers.head import HeadError, OutputHead, eval_mode, find_head
from prodial_kernels.models.mixers.arguments import named_arguments
from prodial_kernels.models.patch_point import AdaptedMixer, Changes, View
from prodial_kernels.training.data.batches import IGNORED
from prodial_kernels.training.step.chunked_loss import chunk_rows, chunked_cross_entropy
from prodial_kernels.training.step.loss import LossError

_SETTINGS = "_prodial_chunked_loss"
# The model's loss and ours on the same tokens: transformers computes it in fp32 of any logits.
_TOLERANCE, _IN_16_BITS = 1e-4, 2e-2


@dataclass(frozen=True)
class _Settings:
    """Of a model whose loss is chunked; copied and pickled with it.

    Attributes:
        head: Name of the head, a child of the model.
        scale: What the model multiplies its output by.
        evaluation: Whether the loss is chunked where nothing is trained, too.
    """

    head: str
    scale: float
    evaluation: bool


class ChunkedModelLoss(Changes):
    """A model's chunked loss, until :meth:`remove`; a context manager as well."""

    def __enter__(self) -> ChunkedModelLoss:
        """Leave it on for a block of code."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take it off."""
        self.remove()


def chunk_loss(model: nn.Module, *, evaluation: bool = False) -> ChunkedModelLoss:
    """Let ``model(input_ids=..., labels=...).loss`` be computed without holding all logits.

    The loss and its gradients are the model's own, ``num_items_in_batch``, ``ignore_index`` and
    ``shift_labels`` included, in transformers' ``Trainer`` and in any other loop. The output then
    has no ``logits``. Without labels, and outside training, nothing changes.

    Args:
        model: A causal language model of transformers, on its device; also in PEFT's wrapper,
            ``torch.compile``'s or DDP's. Adapters may be put in and taken out before and after.
        evaluation: Chunk the loss where gradients are off or the model is in eval mode, too. An
            evaluation that computes metrics of logits needs them, so by default it has them.

    Returns:
        What takes it off again.

    Raises:
        LossError: The model's loss is not the cross-entropy of its logits, or its head cannot be
            run by itself.
    """
    inner = _of_transformers(model)
    if vars(inner).get(_SETTINGS) is not None:
        raise LossError("the loss of this model is chunked already")
    if "forward" in vars(inner):
        raise LossError(
            "the loss cannot be chunked: the model's forward was replaced on the object, as "
            "accelerate does when a trainer takes the model; call this before"
        )
    try:
        head = find_head(inner)
    except HeadError as error:
        raise LossError(f"the loss cannot be chunked: {error}") from error
    name = next((n for n, child in inner._modules.items() if child is head.layer), None)
    if name is None:
        raise LossError(f"the loss cannot be chunked: {type(inner).__name__} does not own its head")
    _check_same_loss(inner, head, name)
    return ChunkedModelLoss(
        [
            SetAttribute(inner, _SETTINGS, _Settings(name, head.scale, evaluation)),
            AdaptedMixer(inner, {"forward": chunked_forward}),
        ]
    )


def chunked_forward(
    model: nn.Module, upstream: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """``model(*args, **kwargs)``; with labels, in training, its loss without whole logits."""
    # None where somebody kept this forward beyond remove().
    settings: _Settings | None = vars(model).get(_SETTINGS)
    trains = model.training and torch.is_grad_enabled()
    labels = named_arguments(upstream, args, kwargs).get("labels")
    if settings is None or labels is None or not (trains or settings.evaluation):
        return upstream(model, *args, **kwargs)
    return _without_logits(_run(model, upstream, settings, args, kwargs))


def _run(
    model: nn.Module,
    upstream: Callable[..., Any],
    settings: _Settings,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    layer: Any = model._modules[settings.head]
    head, seen = OutputHead(model, layer, settings.scale), []

    def note(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        # Whatever the model makes of it, nothing but the loss may depend on it.
        return hidden.new_full((1, 1, 1), torch.nan)

    def loss(
        logits: Any = None,
        labels: Any = None,
        vocab_size: Any = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Transformers' ``ForCausalLMLoss``, which takes these."""
        if shift_labels is None:
            shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        return _cross_entropy(head, seen[-1], shift_labels, ignore_index, num_items_in_batch)

    view = View(model, **{settings.head: Calling(layer, note), "loss_function": loss})
    output = upstream(view, *args, **kwargs)
    if len(seen) != 1:
        raise LossError(
            f"{type(model).__name__} called its head {len(seen)} times in a forward pass, so its "
            "loss cannot be chunked; take it off with remove()"
        )
    return output


def _cross_entropy(
    head: OutputHead,
    hidden: Tensor,
    targets: Tensor,
    ignored: int,
    items: Tensor | int | None,
) -> Tensor:
    """Mean cross-entropy of the targets ``[b, l]`` by hidden states ``[b, l, d]``, or sum / items.

    Nothing waits for the device, so ignored positions are computed too, as by the model itself.
    """
    matrix, bias = head.operands()
    targets = targets.to(hidden.device).flatten()
    learned = targets != ignored
    targets = targets.masked_fill(~learned, IGNORED)
    wide = torch.promote_types(matrix.dtype, torch.float32)
    count = learned.sum() if items is None else torch.as_tensor(items, device=hidden.device)
    return chunked_cross_entropy(
        hidden.flatten(0, 1).to(matrix.dtype), matrix, bias, targets, None,
        weight=count.to(wide).reciprocal(), scale=head.scale,
        rows=chunk_rows(len(matrix), matrix.dtype, matrix.device),
    )  # fmt: skip


def _without_logits(output: Any) -> Any:
    if isinstance(output, tuple):
        return (output[0], *output[2:])
    return type(output)(**{name: value for name, value in output.items() if name != "logits"})


def _of_transformers(model: nn.Module) -> nn.Module:
    inner = without_peft(model)
    if not hasattr(inner, "loss_function"):
        raise LossError(
            f"the loss of {type(inner).__name__} cannot be chunked: it is no causal language model "
            "of transformers, with a loss_function"
        )
    return inner


def _check_same_loss(model: nn.Module, head: OutputHead, name: str) -> None:
    """Raise LossError unless the model computes from a few tokens what is computed here."""
    device = head.layer.weight.device
    ids = torch.arange(16, device=device).remainder(len(head.layer.weight)).view(2, 8)
    labels = ids.clone()
    labels[0, :3] = IGNORED
    inputs = {"input_ids": ids, "labels": labels}
    forward = type(model).forward
    try:
        with torch.no_grad(), eval_mode(model):
            own = forward(model, **inputs)["loss"]
            ours = _run(model, forward, _Settings(name, head.scale, True), (), inputs)["loss"]
    # A model's own code, on a view of it.
    except Exception as error:
        raise LossError(
            f"the loss of {type(model).__name__} cannot be chunked: {type(error).__name__}: {error}"
        ) from error
    tolerance = _IN_16_BITS if head.layer.weight.dtype.itemsize == 2 else _TOLERANCE
    # "not <=": a loss that reads the logits itself is NaN.
    if not abs(float(ours) - float(own)) <= tolerance * abs(float(own)):
        raise LossError(
            f"the loss of {type(model).__name__} is not the cross-entropy of its logits alone: on "
            f"the same tokens it is {float(own):.6g}, and that {float(ours):.6g}"
        )
