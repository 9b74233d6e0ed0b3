"""Cross-entropy of rows of logits, and its gradient in their place."""

import triton
import triton.language as tl
from torch import Tensor

from prodial_kernels.kernels.replay.recorder import launch

# Columns that a program loads at once, and those of a warp: 16 bytes of 16-bit logits a thread. The
# rows of the few programs that a multiprocessor then holds stay in the caches between the passes.
BLOCK, WARP = 4096, 256


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr, V, stride, scale,
    IGNORED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """loss = −log softmax(z)[t] and, with GRADIENT, logits = softmax(z) − onehot(t) in place.

    z = scale · logits, rows of V at a distance of stride; targets int64, losses fp32 [rows]. Where
    t is IGNORED both are 0; where it is no column, NaN. A program owns a row and reads it twice:

        top = max z_j, S = Σ exp(z_j − top) over j ≠ t    x = top − z_t + log S
        loss = log(1 + exp x)                             softmax_t − 1 = −sigmoid x
        softmax_j = exp(z_j − top) sigmoid(x) / S

    The target's term is kept separate, so that nothing small is added to its 1.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    target = tl.load(targets_ptr + row)
    lane = tl.arange(0, BLOCK)
    full = V // BLOCK * BLOCK
    if target == IGNORED:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            for first in range(0, V, BLOCK):
                offs = first + lane
                zero = tl.zeros((BLOCK,), dtype=logits_ptr.dtype.element_ty)
                tl.store(row_ptr + offs, zero, mask=offs < V)
        return

    known = (target >= 0) & (target < V)
    z_target = tl.load(row_ptr + target, mask=known, other=float("nan")).to(tl.float32) * scale
    # A maximum and a sum for every lane. Finite from the start: −∞ less −∞ would be NaN.
    tops = tl.full((BLOCK,), -3.4e38, dtype=tl.float32)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, full, BLOCK):
        z = _others(row_ptr, first + lane, V, target, scale, False)
        tops, sums = _add(tops, sums, z)
    if full < V:
        z = _others(row_ptr, full + lane, V, target, scale, True)
        tops, sums = _add(tops, sums, z)
    top = tl.max(tops, 0)
    total = tl.sum(sums * tl.exp(tops - top), 0)

    x = (top - z_target) + tl.log(total)
    # As with any other infinite logit; without it the loss would be 0.
    x = tl.where(z_target == float("inf"), float("nan"), x)
    small = tl.exp(-tl.abs(x))
    tl.store(losses_ptr + row, tl.where(x < 0, 0.0, x) + _log1p(small))
    if GRADIENT:
        wrong = tl.where(x < 0, small, 1.0) / (1 + small)
        # Nothing is summed where every other logit is −∞.
        share = wrong / tl.where(total == 0, 1.0, total)
        # Backwards: what was read last is still in the caches.
        if full < V:
            offs = full + lane
            z = _others(row_ptr, offs, V, target, scale, True)
            gradient = tl.where(offs == target, -wrong, tl.exp(z - top) * share)
            tl.store(row_ptr + offs, gradient.to(logits_ptr.dtype.element_ty), mask=offs < V)
        for done in range(0, full, BLOCK):
            offs = full - BLOCK - done + lane
            z = _others(row_ptr, offs, V, target, scale, False)
            gradient = tl.where(offs == target, -wrong, tl.exp(z - top) * share)
            tl.store(row_ptr + offs, gradient.to(logits_ptr.dtype.element_ty))


@triton.jit
def _others(row_ptr, offs, V, target, scale, MASKED: tl.constexpr):
    """Scaled logits at ``offs``; −∞ for the target and, where MASKED, beyond the row."""
    # A mask whose end is no multiple of 16 would make every access one of a single element.
    if MASKED:
        inside = offs < V
        z = tl.load(row_ptr + offs, mask=inside, other=0.0)
        excluded = (offs == target) | ~inside
    else:
        z = tl.load(row_ptr + offs)
        excluded = offs == target
    return tl.where(excluded, float("-inf"), z.to(tl.float32) * scale)


@triton.jit
def _add(tops, sums, z):
    """Maxima and sums of exp(· − maximum), lane by lane, with one exponential."""
    ratio = tl.exp(-tl.abs(z - tops))
    larger = z > tops
    return tl.where(larger, z, tops), tl.where(larger, sums * ratio + 1, sums + ratio)


@triton.jit
def _log1p(x):
    """log(1 + x), exact for small x too: the rounding of 1 + x cancels in the quotient."""
    near = 1 + x
    step = near - 1
    quotient = x / tl.where(step == 0, 1.0, step)
    return tl.where(step == 0, x, tl.log(near) * quotient)


def cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    *,
    scale: float,
    ignored: int,
    gradient: bool,
) -> None:
    """Write each row's loss, and the gradient of that over the logits, on the current device.

    Args:
        logits: ``[rows, V]`` of 16 or 32 bits, rows contiguous. Where they begin at
            multiples of 16 elements they are read 16 bytes at a time.
        targets: int64 ``[rows]``, contiguous; a row's label or ``ignored``.
        losses: fp32 ``[rows]``, contiguous, to write ``−log softmax(scale · logits)[target]`` to: 0
            where the target is ignored, NaN where it is neither that nor a column.
        scale: Of the logits.
        ignored: The target of rows that count for nothing.
        gradient: Whether to overwrite the logits by ``softmax − onehot``, zeros in ignored rows.

    Raises:
        ValueError: The rows are not contiguous.
    """
    rows, vocabulary = logits.shape
    if vocabulary > 1 and logits.stride(1) != 1:
        raise ValueError(
            f"logits must have contiguous rows, got strides {tuple(logits.stride())}; pass a copy"
        )
    if rows == 0:
        return
    block = min(BLOCK, max(WARP, triton.next_power_of_2(vocabulary)))
    launch(
        _cross_entropy_kernel, (rows,),
        logits_ptr=logits, targets_ptr=targets, losses_ptr=losses,
        V=vocabulary, stride=logits.stride(0), scale=float(scale),
        IGNORED=ignored, GRADIENT=gradient, BLOCK=block, num_warps=block // WARP,
    )  # fmt: skip
