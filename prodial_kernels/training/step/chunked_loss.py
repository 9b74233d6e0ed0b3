"""Cross-entropy of hidden states under a head, with the logits of one chunk in memory.

A chunk's logits are made in a buffer that all chunks share and become, in place, their own
gradient, which is multiplied back to the hidden states at once. On CUDA a kernel reads and writes
them in their dtype, and the buffer is all that is held (of a head that is stored in 4 or 8 bits a
few rows beside it, dense for their products); elsewhere, and in fp64, PyTorch computes
the same beside one fp32 copy of 16-bit logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prodial_kernels.models.layers.head import StoredMatrix
from prodial_kernels.training.data.batches import IGNORED

Weight: TypeAlias = Tensor | float

_CHUNK_BYTES = 2**27
_LEAST_ROWS = 128
# cuBLAS's fast kernels want every matrix's rows to begin at multiples of 16 bytes and to have as
# many elements ("Tensor Core Usage" in its manual). The buffer's begin at multiples of 128 bytes,
# which the memory likes and from which Triton, which looks for 16 elements, sees wide accesses.
_ALIGNED, _ROW = 8, 64


def chunk_rows(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many tokens' logits of ``dtype`` are made at a time: about 128 MiB of them.

    A power of two, at least 128: on CUDA 1024 in 16 bits for vocabularies of 50,000 to 65,536,
    whose products fill the device; 512 where they are computed in fp32.
    """
    wide = dtype if takes_kernel(device, dtype) else _wide(dtype)
    rows = max(_LEAST_ROWS, _CHUNK_BYTES // (wide.itemsize * vocabulary))
    return 1 << (rows.bit_length() - 1)


def chunked_cross_entropy(
    hidden: Tensor,
    matrix: Tensor | StoredMatrix,
    bias: Tensor | None,
    targets: Tensor,
    positions: Tensor | None,
    *,
    weight: Weight,
    scale: float,
    rows: int,
) -> Tensor:
    """Return ``weight · Σ −log softmax(scale (h Wᵀ + bias))[target]``.

    Gradients towards the hidden states, the matrix and the bias are computed in forward, where they
    are asked for. Nothing waits for the device, and all is added in a fixed order.

    Args:
        hidden: h ``[n, d]``, in the dtype of ``matrix``.
        matrix: W ``[v, d]``; one that is stored gets no gradient.
        bias: ``[v]`` in the same dtype, or None.
        targets: int64 ``[n]``, :data:`IGNORED` among them; with ``positions`` ``[m]``.
        positions: int64 ``[m]``: which hidden states the targets belong to; None for all.
        weight: Of the sum; a tensor must be on the device.
        scale: Of the logits.
        rows: Tokens in a chunk.

    Returns:
        0-dim, fp32 (fp64 for fp64 logits).
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(
        hidden, matrix, bias, targets, positions, weight, scale, rows
    )
    return loss


@torch.no_grad()
def chunked_losses(
    hidden: Tensor,
    matrix: Tensor | StoredMatrix,
    bias: Tensor | None,
    targets: Tensor,
    *,
    scale: float,
    rows: int,
) -> Tensor:
    """Return ``−log softmax(scale (h Wᵀ + bias))[target]`` of every token, without gradients.

    The arguments are those of :func:`chunked_cross_entropy`; an ignored target's loss is 0.

    Returns:
        ``[n]``, fp32 (fp64 for fp64 logits), nats.
    """
    losses = hidden.new_empty(len(targets), dtype=_wide(matrix.dtype))
    buffer = logits_buffer(matrix, min(rows, len(targets)))
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        logits = _logits(hidden[part], matrix, bias, buffer)
        _cross_entropy_(logits, targets[part], losses[part], scale, gradient=False)
    return losses


class _ChunkedCrossEntropy(torch.autograd.Function):
    """See :func:`chunked_cross_entropy`.

    Kept: the gradient towards the hidden states, in their dtype, and towards W and the bias, in
    fp32, where these train.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        matrix: Tensor | StoredMatrix,
        bias: Tensor | None,
        targets: Tensor,
        positions: Tensor | None,
        weight: Weight,
        scale: float,
        rows: int,
    ) -> Tensor:
        """Sum the chunks."""
        asked = ctx.needs_input_grad[:3]
        wide = _wide(matrix.dtype)
        # Where positions are given the others get no gradient.
        make = torch.empty_like if positions is None else torch.zeros_like
        gradients = _Gradients(
            make(hidden) if asked[0] else None,
            hidden.new_zeros(matrix.shape, dtype=wide) if asked[1] else None,
            hidden.new_zeros(len(matrix), dtype=wide) if asked[2] else None,
        )
        # Of two dimensions: a factor of none would be rounded to the dtype of what it multiplies.
        factor = torch.full((1, 1), scale, dtype=wide, device=hidden.device) * weight
        losses = torch.empty(len(targets), dtype=wide, device=hidden.device)
        buffer = logits_buffer(matrix, min(rows, len(targets)))
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            places = part if positions is None else positions[part]
            h = hidden[places]
            logits = _logits(h, matrix, bias, buffer)
            _cross_entropy_(logits, targets[part], losses[part], scale, gradient=any(asked))
            gradients.add(logits, h, matrix, places, factor)
        ctx.save_for_backward(gradients.hidden, gradients.matrix, gradients.bias, factor)
        ctx.dtypes = (matrix.dtype, None if bias is None else bias.dtype)
        return losses.sum() * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, matrix and bias."""
        hidden, *of_head, factor = ctx.saved_tensors
        if hidden is not None:
            hidden = torch.mul(hidden, factor * grad_loss, out=torch.empty_like(hidden))
        head = [
            None if gradient is None else (gradient * grad_loss).to(dtype)
            for gradient, dtype in zip(of_head, ctx.dtypes, strict=True)
        ]
        return (hidden, *head, None, None, None, None, None)


@dataclass(frozen=True)
class _Gradients:
    """Where the chunks' gradients are gathered; None where none is asked for.

    Attributes:
        hidden: ``[n, d]`` in 16 bits too, so it waits for its factor, by which it could underflow.
        matrix: ``[v, d]``, fp32.
        bias: ``[v]``, fp32.
    """

    hidden: Tensor | None
    matrix: Tensor | None
    bias: Tensor | None

    def add(
        self,
        logits: Tensor,
        h: Tensor,
        matrix: Tensor | StoredMatrix,
        places: Tensor | slice,
        factor: Tensor,
    ) -> None:
        """Add those of a chunk, whose ``logits`` ``[m, v]`` have become ``softmax − onehot``."""
        if self.hidden is not None:
            if isinstance(places, slice):
                _times(logits, matrix, self.hidden[places])
            else:
                self.hidden[places] = _times(logits, matrix, torch.empty_like(h))
        if self.matrix is not None:
            weighted = (h * factor).to(h.dtype)
            for span in _spans(len(matrix)):
                self.matrix[span].add_(logits[:, span].mT @ weighted)
        if self.bias is not None:
            self.bias.add_(logits.sum(0, dtype=self.bias.dtype) * factor[0])


def _spans(vocabulary: int) -> Sequence[slice]:
    """The columns that aligned products take, and those fewer than 8 that are left over."""
    whole = vocabulary - vocabulary % _ALIGNED
    spans = slice(0, whole), slice(whole, vocabulary)
    return [span for span in spans if span.start < span.stop]


def logits_buffer(matrix: Tensor | StoredMatrix, rows: int) -> Tensor:
    """Room for ``rows`` rows of logits, each a little wider than the vocabulary and 0 there.

    Products read to the ends of the rows: oneDNN's in bf16 on a CPU with AMX does, and keeps a NaN.
    """
    width = -(-len(matrix) // _ROW) * _ROW
    buffer = torch.empty(rows, width, dtype=matrix.dtype, device=matrix.device)
    buffer[:, len(matrix) :] = 0
    return buffer


def _parts(matrix: Tensor | StoredMatrix) -> Iterator[tuple[slice, Tensor]]:
    """Rows of W, and which they are: all of a dense one, a few of a stored one at a time."""
    if isinstance(matrix, Tensor):
        yield slice(0, len(matrix)), matrix
    else:
        yield from matrix.parts()


def _logits(
    h: Tensor, matrix: Tensor | StoredMatrix, bias: Tensor | None, buffer: Tensor
) -> Tensor:
    """Write h Wᵀ + bias to the buffer; return it as ``[m, v]``."""
    logits = buffer[: len(h), : len(matrix)]
    for part, dense in _parts(matrix):
        for span in _spans(len(dense)):
            out = logits[:, part][:, span]
            if bias is None:
                torch.mm(h, dense[span].mT, out=out)
            else:
                torch.addmm(bias[part][span], h, dense[span].mT, out=out)
    return logits


def _times(logits: Tensor, matrix: Tensor | StoredMatrix, out: Tensor) -> Tensor:
    """Write ``logits @ matrix`` to ``out``."""
    if not isinstance(matrix, Tensor):
        # Summed in fp32: each part's own rounding is as small as the whole's.
        total = torch.zeros_like(out, dtype=_wide(out.dtype))
        for part, dense in matrix.parts():
            total += _times(logits[:, part], dense, torch.empty_like(out))
        return out.copy_(total)
    # The large product last: it adds in fp32 to what the small one left, rounded.
    *small, large = reversed(_spans(logits.shape[1]))
    for span in small:
        torch.mm(logits[:, span], matrix[span], out=out)
    if small:
        return out.addmm_(logits[:, large], matrix[large])
    return torch.mm(logits[:, large], matrix[large], out=out)


def _cross_entropy_(
    logits: Tensor, targets: Tensor, losses: Tensor, scale: float, *, gradient: bool
) -> None:
    """Write ``−log softmax(scale · logits)[target]`` and overwrite the logits.

    Args:
        logits: ``[m, v]``; ``softmax − onehot`` afterwards with ``gradient``, else of no use.
        targets: int64 ``[m]``; an ignored one's loss and gradient are 0.
        losses: ``[m]``, fp32 (fp64 for fp64 logits).
        scale: Of the logits.
        gradient: Whether it is asked for.
    """
    if takes_kernel(logits.device, logits.dtype):
        from prodial_kernels.kernels.cross_entropy import cross_entropy_

        # Triton launches on the current device, which need not be that of the logits.
        with torch.cuda.device_of(logits):
            cross_entropy_(logits, targets, losses, scale=scale, ignored=IGNORED, gradient=gradient)
        return
    column, learned = targets.clamp_min(0)[:, None], targets != IGNORED
    # The logits themselves where they are as wide.
    powers = logits.to(losses.dtype).mul_(scale)
    powers.sub_(powers.amax(-1, keepdim=True))
    picked = powers.gather(1, column)
    total = powers.exp_().sum(-1, keepdim=True)
    log_p = picked - total.log()
    losses.copy_(torch.where(learned, -log_p.squeeze(1), 0))
    if gradient:
        # The label's own entry without cancellation.
        powers.div_(total).scatter_(1, column, torch.expm1(log_p))
        logits.copy_(powers).masked_fill_(~learned[:, None], 0)


def takes_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel computes this; fp64, which serves tests, it does not."""
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16, torch.float32)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)
