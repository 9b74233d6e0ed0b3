"""The training loss, without ever holding the logits of a whole batch.

The logits of a small model with a large vocabulary are its largest tensor: 8 × 2048 tokens by
50,280 words are 3.1 GiB in fp32, and as much again for their gradient. Three ways to the same sum:

* ``chunked``: a few hundred tokens at a time; each chunk's logits become their gradient in
  place, which is multiplied back to the hidden states at once, so forward leaves theirs behind. See
  :mod:`prodial_kernels.training.step.chunked_loss`.
* ``liger``: liger-kernel's fused linear cross-entropy, the same idea with a fused kernel for the
  softmax. It waits for the device, so it cannot be part of a CUDA graph.
* ``full``: the model's own logits and ``cross_entropy``: for models whose head does something else.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from prodial_kernels._checks import check_choice
from prodial_kernels.models.layers.head import HeadError, OutputHead, find_head, run_model
from prodial_kernels.training.config import LOSSES
from prodial_kernels.training.data.batches import IGNORED, to_device
from prodial_kernels.training.step.chunked_loss import (
    Weight,
    chunk_rows,
    chunked_cross_entropy,
    chunked_losses,
)


class LossError(ValueError):
    """A loss cannot be used on this model or machine."""


class Loss(Protocol):
    """Sums the negative log-likelihood of a batch's labels.

    Attributes:
        name: One of ``FinetuneConfig.loss``'s values, ``"auto"`` left out.
    """

    name: str

    def __call__(
        self, input_ids: Tensor, labels: Tensor, weight: Weight = 1.0, *,
        every_position: bool = False, **inputs: Any,
    ) -> Tensor:  # fmt: skip
        """Return ``weight · Σ −log p(label)``.

        Args:
            input_ids: int64 ``[b, l]``, where the model is.
            labels: int64 ``[b, l]``, not shifted; :data:`IGNORED` where nothing is learned.
            weight: Of the sum, such as one by the number of labels; a tensor must be on the
                device. Applied in fp32, which a factor on the result would not be.
            every_position: Compute all positions, in a shape that does not depend on the labels,
                as a CUDA graph needs. Else ignored ones may be dropped before any logits are made,
                for which the labels are best left on the CPU: nothing waits for the device then.
            inputs: Further inputs of the model.

        Returns:
            0-dim, fp32 (fp64 for fp64 logits).
        """


class FullLoss:
    """The model's own logits, all of them."""

    name = "full"

    def __init__(self, model: nn.Module) -> None:
        """Take the loss of ``model``."""
        self.model = model

    def __call__(
        self, input_ids: Tensor, labels: Tensor, weight: Weight = 1.0, *,
        every_position: bool = False, **inputs: Any,
    ) -> Tensor:  # fmt: skip
        """See :class:`Loss`."""
        targets = to_device(labels[:, 1:].flatten(), input_ids.device)
        logits = run_model(self.model, input_ids, **inputs).logits
        # The last position predicts what no label holds.
        logits = logits[:, :-1].flatten(0, 1)
        return weight * functional.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)),
            targets,
            ignore_index=IGNORED,
            reduction="sum",
        )


class ChunkedLoss:
    """Logits of ``rows`` tokens at a time; see the module's docstring."""

    name = "chunked"

    def __init__(self, head: OutputHead, *, rows: int | None = None) -> None:
        """Take the loss of ``head.model``; ``rows`` defaults to :func:`chunk_rows`."""
        self.head = head
        self.rows = rows

    def __call__(
        self, input_ids: Tensor, labels: Tensor, weight: Weight = 1.0, *,
        every_position: bool = False, **inputs: Any,
    ) -> Tensor:  # fmt: skip
        """See :class:`Loss`."""
        targets, positions = _targets(labels, input_ids.device, every_position)
        hidden = self.head.hidden(input_ids, **inputs).flatten(0, 1)
        matrix, bias = self.head.matrix()
        rows = self.rows or chunk_rows(len(matrix), matrix.dtype, matrix.device)
        return chunked_cross_entropy(
            hidden.to(matrix.dtype), matrix, bias, targets, positions,
            weight=weight, scale=self.head.scale, rows=rows,
        )  # fmt: skip


class LigerLoss:
    """liger-kernel's fused linear cross-entropy; CUDA only."""

    name = "liger"

    def __init__(self, head: OutputHead) -> None:
        """Take the loss of ``head.model``."""
        from liger_kernel.transformers.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyLoss,
        )

        self.head = head
        self._loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum")

    def __call__(
        self, input_ids: Tensor, labels: Tensor, weight: Weight = 1.0, *,
        every_position: bool = False, **inputs: Any,
    ) -> Tensor:  # fmt: skip
        """See :class:`Loss`."""
        targets, positions = _targets(labels, input_ids.device, every_position)
        hidden = self.head.hidden(input_ids, **inputs).flatten(0, 1)
        if positions is not None:
            hidden = hidden[positions]
        matrix, bias = self.head.operands()
        if bias is not None:
            bias = bias * self.head.scale
        # It knows no factor on the logits: (c h) Wᵀ = c (h Wᵀ).
        return weight * self._loss(matrix, hidden.to(matrix.dtype) * self.head.scale, targets, bias)


def choose_loss(
    kind: str,
    device: torch.device,
    *,
    graphed: bool = False,
    head_obstacle: str | None = None,
    stored_head: bool = False,
) -> tuple[str, str]:
    """Choose how the loss is computed.

    Args:
        kind: ``"auto"``, ``"chunked"``, ``"liger"`` or ``"full"``. ``"auto"`` is liger-kernel's on
            CUDA where it is installed and the step is not graphed, else the chunked one; ``"full"``
            only where the model's head cannot be taken out.
        device: Where the model is.
        graphed: Whether steps are captured in a CUDA graph.
        head_obstacle: Why the model's head cannot be taken out; None if it can.
        stored_head: Whether it is stored in 4 or 8 bits, which liger-kernel would need whole.

    Returns:
        ``"chunked"``, ``"liger"`` or ``"full"``, and why, in a few words.

    Raises:
        LossError: ``kind`` cannot be used here.
        ValueError: An unknown ``kind``.
    """
    check_choice("kind", kind, LOSSES)
    if kind == "full":
        return kind, "as asked for"
    if head_obstacle is not None:
        if kind == "auto":
            return "full", f"the logits are whole in memory: {head_obstacle}"
        raise LossError(f"loss {kind!r} cannot be used: {head_obstacle}; use loss 'full'")
    without_liger = _without_liger(device, graphed)
    if kind == "liger" and without_liger:
        raise LossError(f"loss 'liger' cannot be used: {without_liger}")
    if kind == "auto":
        if stored_head:
            return "chunked", "neither the logits nor the dense head are ever whole"
        if without_liger:
            return "chunked", "the logits are never whole"
        return "liger", "liger-kernel is installed"
    return kind, "as asked for"


def make_loss(model: nn.Module, name: str) -> Loss:
    """Make the loss that :func:`choose_loss` has named.

    Args:
        model: A causal language model of transformers or mamba_ssm, on its device.
        name: ``"chunked"``, ``"liger"`` or ``"full"``.

    Raises:
        LossError: The model's head cannot be taken out.
    """
    if name == "full":
        return FullLoss(model)
    try:
        head = find_head(model)
    except HeadError as error:
        raise LossError(f"loss {name!r} cannot be used: {error}; use loss 'full'") from error
    return LigerLoss(head) if name == "liger" else ChunkedLoss(head)


def _without_liger(device: torch.device, graphed: bool) -> str:
    """Why liger-kernel's loss cannot be used; empty if it can."""
    if device.type != "cuda":
        return "it needs a CUDA device; use 'chunked'"
    if find_spec("liger_kernel") is None:
        return "it is not installed: pip install liger-kernel"
    return "it waits for the device; use 'chunked', or cuda_graph 'off'" if graphed else ""


@torch.no_grad()
def negative_log_likelihoods(head: OutputHead, hidden: Tensor, targets: Tensor) -> Tensor:
    """Score tokens by hidden states, a chunk at a time, without gradients.

    ``hidden`` ``[n, d]`` is as :meth:`OutputHead.hidden` gives it; ``targets``, int64 ``[n]``, what
    each is to predict -> fp32 ``[n]`` (fp64 for fp64 logits), nats.
    """
    matrix, bias = head.matrix()
    return chunked_losses(
        hidden.to(matrix.dtype), matrix, bias, targets,
        scale=head.scale, rows=chunk_rows(len(matrix), matrix.dtype, matrix.device),
    )  # fmt: skip


def _targets(
    labels: Tensor, device: torch.device, every_position: bool
) -> tuple[Tensor, Tensor | None]:
    """What each hidden state is to predict, and which of them are to predict anything.

    Returns:
        With ``every_position``: targets ``[b·l]`` and None. Else: targets ``[m]`` without ignored
        ones, and their places ``[m]`` among all ``b·l``. Both are on ``device``.
    """
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    if every_position:
        return to_device(targets, device), None
    positions = (targets != IGNORED).nonzero().squeeze(1)
    return to_device(targets[positions], device), to_device(positions, device)
