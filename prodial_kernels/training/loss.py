"""The training loss, without ever holding the logits of a whole batch.

The logits of a small model with a large vocabulary are its largest tensor: 8 × 2048 tokens by
50,280 words are 3.1 GiB in fp32, and as much again for their gradient. Three ways to the same sum:

* ``chunked``: a few hundred tokens at a time; each chunk's logits become their softmax and that its
  gradient in place, beside one fp32 copy, and the gradient is multiplied back to the hidden states
  at once, so forward leaves theirs behind.
* ``liger``: liger-kernel's fused linear cross-entropy, the same idea with a fused kernel for the
  softmax. It waits for the device, so it cannot be part of a CUDA graph.
* ``full``: the model's own logits and ``cross_entropy``: for models whose head does something else.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from prodial_kernels.training.batches import IGNORED, to_device
from prodial_kernels.training.config import LOSSES
from prodial_kernels.training.head import HeadError, OutputHead, find_head, run_model

Weight: TypeAlias = Tensor | float

_CHUNK_BYTES = 2**27
_LEAST_ROWS = 128


class LossError(ValueError):
    """A loss cannot be used on this model or machine."""


class Loss(Protocol):
    """Sums the negative log-likelihood of a batch's labels.

    Attributes:
        name: One of ``FinetuneConfig.loss``'s values, ``"auto"`` left out.
    """

    name: str

    def __call__(
        self, input_ids: Tensor, labels: Tensor, weight: Weight = 1.0, **inputs: Any
    ) -> Tensor:
        """Return ``weight · Σ −log p(label)``.

        Args:
            input_ids: int64 ``[b, l]``, where the model is.
            labels: int64 ``[b, l]``, not shifted; :data:`IGNORED` where nothing is learned. Left
                on the CPU, ignored positions are dropped before any logits are made; on the device
                all positions are computed, in a shape that does not depend on the labels.
            weight: Of the sum, such as one by the number of labels; a tensor must be on the
                device. Applied in fp32, which a factor on the result would not be.
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
        self, input_ids: Tensor, labels: Tensor, weight: Weight = 1.0, **inputs: Any
    ) -> Tensor:
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
        self.rows = rows or chunk_rows(head.layer.out_features)

    def __call__(
        self, input_ids: Tensor, labels: Tensor, weight: Weight = 1.0, **inputs: Any
    ) -> Tensor:
        """See :class:`Loss`."""
        targets, positions = _targets(labels, input_ids.device)
        hidden = self.head.hidden(input_ids, **inputs).flatten(0, 1)
        layer, matrix = self.head.layer, self.head.weight()
        return _ChunkedCrossEntropy.apply(
            hidden.to(matrix.dtype), matrix,
            None if layer.bias is None else layer.bias.to(matrix.dtype),
            targets, positions, weight, self.head.scale, self.rows,
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
        self, input_ids: Tensor, labels: Tensor, weight: Weight = 1.0, **inputs: Any
    ) -> Tensor:
        """See :class:`Loss`."""
        targets, positions = _targets(labels, input_ids.device)
        hidden = self.head.hidden(input_ids, **inputs).flatten(0, 1)
        if positions is not None:
            hidden = hidden[positions]
        layer, matrix = self.head.layer, self.head.weight()
        bias = None if layer.bias is None else layer.bias.to(matrix.dtype) * self.head.scale
        # It knows no factor on the logits: (c h) Wᵀ = c (h Wᵀ).
        return weight * self._loss(matrix, hidden.to(matrix.dtype) * self.head.scale, targets, bias)


def make_loss(model: nn.Module, kind: str = "auto", *, graphed: bool = False) -> tuple[Loss, str]:
    """Choose how the loss is computed.

    Args:
        model: A causal language model of transformers or mamba_ssm, on its device.
        kind: ``"auto"``, ``"chunked"``, ``"liger"`` or ``"full"``. ``"auto"`` is liger-kernel's on
            CUDA where it is installed and the step is not graphed, else the chunked one; ``"full"``
            only where the model's head cannot be taken out.
        graphed: Whether steps are captured in a CUDA graph.

    Returns:
        The loss, and why it was chosen, in a few words.

    Raises:
        LossError: ``kind`` cannot be used here.
        ValueError: An unknown ``kind``.
    """
    if kind not in LOSSES:
        raise ValueError(f"kind must be one of {', '.join(map(repr, LOSSES))}, got {kind!r}")
    if kind == "full":
        return FullLoss(model), "as asked for"
    try:
        head = find_head(model)
    except HeadError as error:
        if kind == "auto":
            return FullLoss(model), f"the logits are whole in memory: {error}"
        raise LossError(f"loss {kind!r} cannot be used: {error}; use loss 'full'") from error
    on_cuda = head.layer.weight.device.type == "cuda"
    liger = find_spec("liger_kernel") is not None
    if kind == "liger":
        for holds, what in (
            (on_cuda, "it needs a CUDA device; use 'chunked'"),
            (liger, "it is not installed: pip install liger-kernel"),
            (not graphed, "it waits for the device; use 'chunked', or cuda_graph 'off'"),
        ):
            if not holds:
                raise LossError(f"loss 'liger' cannot be used: {what}")
        return LigerLoss(head), "as asked for"
    if kind == "auto" and on_cuda and liger and not graphed:
        return LigerLoss(head), "liger-kernel is installed"
    return ChunkedLoss(head), "as asked for" if kind == "chunked" else "the logits are never whole"


def chunk_rows(vocabulary: int) -> int:
    """Return how many tokens' logits are made at a time: about 128 MiB of them in fp32.

    A power of two, at least 128: 512 for vocabularies of 50,000 to 65,536, where the product is
    still bound by arithmetic and not by reading the head's weight again for every chunk.
    """
    rows = max(_LEAST_ROWS, _CHUNK_BYTES // (4 * vocabulary))
    return 1 << (rows.bit_length() - 1)


@torch.no_grad()
def negative_log_likelihoods(head: OutputHead, hidden: Tensor, targets: Tensor) -> Tensor:
    """Score tokens by hidden states, a chunk at a time, without gradients.

    Args:
        head: The model's head.
        hidden: ``[n, d]``, as :meth:`OutputHead.hidden` gives them.
        targets: int64 ``[n]``, what each of them is to predict.

    Returns:
        fp32 ``[n]`` (fp64 for fp64 logits), nats.
    """
    rows = chunk_rows(head.layer.out_features)
    parts = []
    for part, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        # Nothing else of it is given a name: that would be there beside the next chunk.
        log_p = _exponentials(head.logits(part), target[:, None])[2]
        parts.append(-log_p.squeeze(1))
    return torch.cat(parts)


def _targets(labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """What each hidden state is to predict, and which of them are to predict anything.

    Returns:
        From labels on the CPU: targets ``[m]`` without ignored ones, and their places ``[m]``
        among all ``b·l``. Else: targets ``[b·l]`` and None. Both are on ``device``.
    """
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    if labels.device.type != "cpu":
        return targets, None
    positions = (targets != IGNORED).nonzero().squeeze(1)
    return to_device(targets[positions], device), to_device(positions, device)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """``weight · Σ −log softmax(scale (h Wᵀ + bias))[target]``, gradients computed in forward.

    Kept: the gradient towards the hidden states, in their dtype, and towards W and the bias where
    these train.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        positions: Tensor | None,
        weight: Weight,
        scale: float,
        rows: int,
    ) -> Tensor:
        """Hidden [n, d], matrix [v, d], bias [v], targets [m] and positions [m], or targets [n]."""
        asked = ctx.needs_input_grad[:3]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        # Where positions are given the others get no gradient.
        make = torch.empty_like if positions is None else torch.zeros_like
        gradients = _Gradients(
            make(hidden) if asked[0] else None,
            torch.zeros_like(matrix, dtype=wide) if asked[1] else None,
            torch.zeros_like(matrix[:, 0], dtype=wide) if asked[2] else None,
        )
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            places = part if positions is None else positions[part]
            loss += _chunk(hidden, places, matrix, bias, targets[part], weight, scale, gradients)
        saved = (gradients.hidden, gradients.matrix, gradients.bias)
        ctx.save_for_backward(*saved)
        ctx.dtypes = (hidden.dtype, matrix.dtype, None if bias is None else bias.dtype)
        return loss * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, matrix and bias."""
        gradients = [
            None if gradient is None else (gradient * grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None, None, None, None)


class _Gradients:
    """Where the chunks' gradients are gathered; None where none is asked for."""

    def __init__(self, hidden: Tensor | None, matrix: Tensor | None, bias: Tensor | None) -> None:
        self.hidden = hidden
        self.matrix = matrix
        self.bias = bias


def _chunk(
    hidden: Tensor,
    places: Tensor | slice,
    matrix: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weight: Weight,
    scale: float,
    gradients: _Gradients,
) -> Tensor:
    """Add one chunk's gradients; return its sum. A function of its own, so that its tensors go."""
    h = hidden[places]
    logits = functional.linear(h, matrix, bias)
    if scale != 1:
        logits *= scale
    learned = targets != IGNORED
    column = targets.clamp_min(0)[:, None]
    powers, total, picked = _exponentials(logits, column)
    loss = -torch.where(learned, picked.squeeze(1), 0).sum()
    if gradients.hidden is None and gradients.matrix is None and gradients.bias is None:
        return loss
    # softmax − one-hot; the label's own entry without cancellation.
    softmax = powers.div_(total)
    softmax.scatter_(1, column, torch.expm1(picked))
    logits.copy_(softmax)
    factor = torch.where(learned, scale * weight, 0.0)[:, None].to(softmax.dtype)
    if gradients.hidden is not None:
        gradients.hidden[places] = (logits @ matrix * factor).to(hidden.dtype)
    if gradients.matrix is not None:
        gradients.matrix += logits.mT @ (h * factor).to(h.dtype)
    if gradients.bias is not None:
        gradients.bias += softmax.mul_(factor).sum(0)
    return loss


def _exponentials(logits: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a softmax as far as a loss needs it, beside one copy of the logits in fp32.

    Args:
        logits: ``[n, v]``; not read again, overwritten where they are fp32 or fp64 themselves.
        column: int64 ``[n, 1]``.

    Returns:
        ``exp(logits − max)`` ``[n, v]``, its sum over a row ``[n, 1]``, and ``log softmax`` at the
        columns ``[n, 1]``, in fp32 (fp64 for fp64 logits).
    """
    powers = logits.to(torch.promote_types(logits.dtype, torch.float32))
    powers.sub_(logits.amax(-1, keepdim=True))
    picked = powers.gather(1, column)
    total = powers.exp_().sum(-1, keepdim=True)
    return powers, total, picked - total.log()
