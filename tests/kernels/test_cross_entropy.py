"""The cross-entropy kernel against fp64, and what it compiles to.

Interpreted on a CPU, where bf16 is wrong (triton-lang/triton#11584); ``-m gpu`` runs it too.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from prodial_kernels.kernels.cross_entropy import BLOCK, cross_entropy_
from support.kernels.uninterpreted import run_uninterpreted

IGNORED = -100
DTYPES = [
    torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]  # fmt: skip
# numpy warns where a device's arithmetic has an infinity or a NaN as its answer.
infinite = pytest.mark.filterwarnings(
    "ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning"
)


def exact(logits: Tensor, targets: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Losses and ``softmax − onehot`` in fp64."""
    z = (logits.double() * scale).requires_grad_()
    losses = functional.cross_entropy(z, targets, reduction="none", ignore_index=IGNORED)
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    return losses.detach(), gradient


def computed(
    logits: Tensor, targets: Tensor, device: str, scale: float = 1.0, *, gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """What the kernel makes of a copy with the same strides, and the copy, on the CPU."""
    copy = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=device)
    copy.copy_(logits)
    # What is not written is no number.
    losses = torch.full((len(logits),), float("nan"), device=device)
    cross_entropy_(
        copy, targets.to(device), losses, scale=scale, ignored=IGNORED, gradient=gradient
    )
    return losses.cpu(), copy.cpu()


def assert_exact(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """fp32 arithmetic, and one rounding of the gradient to its dtype."""
    losses, gradient = found
    torch.testing.assert_close(losses.double(), expected[0], rtol=3e-6, atol=1e-30)
    smallest = torch.finfo(gradient.dtype).smallest_normal
    rounding = torch.finfo(gradient.dtype).eps / 2
    error = (gradient.double() - expected[1]).abs()
    allowed = (rounding + 5e-6) * expected[1].abs() + rounding * smallest * 4
    assert (error <= allowed).all(), float((error / allowed).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.37, -2.0])
@pytest.mark.parametrize("vocabulary", [2, 17, 1000, 1003, BLOCK, BLOCK + 5])
def test_losses_and_gradients(
    vocabulary: int, scale: float, dtype: torch.dtype, kernel_device: str
) -> None:
    logits = (torch.randn(4, vocabulary) * 3).to(dtype)
    targets = torch.randint(0, vocabulary, (4,))
    targets[1], targets[2], targets[3] = IGNORED, 0, vocabulary - 1
    found = computed(logits, targets, kernel_device, scale)
    assert_exact(found, exact(logits, targets, scale))
    assert found[0][1] == 0
    assert not found[1][1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_anywhere_in_memory(dtype: torch.dtype, kernel_device: str) -> None:
    """Rows with a gap between them, which must not be written to."""
    wide = torch.randn(3, 1100).to(dtype)
    targets = torch.tensor([5, 1002, IGNORED])
    expected = exact(wide[:, 40:1043], targets)
    wide = wide.to(kernel_device)
    around = wide.clone()
    losses = torch.empty(3, device=kernel_device)
    part = wide[:, 40:1043]
    cross_entropy_(
        part, targets.to(kernel_device), losses, scale=1.0, ignored=IGNORED, gradient=True
    )
    assert_exact((losses.cpu(), part.cpu()), expected)
    part.copy_(around[:, 40:1043])
    assert torch.equal(wide, around)


def test_one_row_one_column_and_none(kernel_device: str) -> None:
    logits, targets = torch.randn(1, 300), torch.tensor([7])
    assert_exact(computed(logits, targets, kernel_device), exact(logits, targets))
    assert computed(torch.randn(0, 300), targets[:0], kernel_device)[0].shape == (0,)


@infinite
def test_a_vocabulary_of_one_word(kernel_device: str) -> None:
    losses, gradient = computed(torch.randn(2, 1), torch.tensor([0, IGNORED]), kernel_device)
    assert not losses.any()
    assert not gradient.any()


def test_all_ignored(kernel_device: str) -> None:
    targets = torch.full((3,), IGNORED)
    # Not even a NaN gets through.
    logits = torch.full((3, BLOCK + 1), float("nan"))
    losses, gradient = computed(logits, targets, kernel_device)
    assert not losses.any()
    assert not gradient.any()


def test_without_a_gradient_the_logits_stay(kernel_device: str) -> None:
    logits, targets = torch.randn(3, 1003), torch.tensor([5, IGNORED, 1002])
    losses, after = computed(logits, targets, kernel_device, gradient=False)
    assert torch.equal(after, logits)
    assert torch.equal(losses, computed(logits, targets, kernel_device)[0])


@pytest.mark.parametrize("large", [30.0, 80.0, 1e4])
def test_a_label_that_stands_out_and_one_that_is_ruled_out(
    large: float, kernel_device: str
) -> None:
    """Losses from 2e-32 and from 0 to 20,000, with their gradients; fp64 itself loses 1e-17."""
    logits = torch.randn(3, 1003) * 0.1
    logits[0, 5] = large
    logits[1, 5] = -large
    logits[2] = torch.linspace(-large, large, 1003)
    targets = torch.tensor([5, 5, 40])
    others = logits.double().scatter(1, targets[:, None], -torch.inf)
    odds = others.logsumexp(1) - logits.gather(1, targets[:, None]).squeeze(1).double()
    expected = torch.logaddexp(odds, torch.zeros(()).double())
    expected = torch.where(odds < -30, odds.exp(), expected)
    losses, gradient = computed(logits, targets, kernel_device)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-37)
    # The label's own entry is 1 less its probability, and the others' are all of it.
    label = gradient.gather(1, targets[:, None]).squeeze(1).double()
    torch.testing.assert_close(label, -odds.sigmoid(), rtol=1e-5, atol=1e-37)
    rest = gradient.double().scatter(1, targets[:, None], 0).sum(1)
    torch.testing.assert_close(rest, odds.sigmoid(), rtol=1e-5, atol=1e-37)


@infinite
@pytest.mark.parametrize("vocabulary", [20, BLOCK + 3])
def test_words_that_are_masked_out(vocabulary: int, kernel_device: str) -> None:
    """Some of them, all but the label, and the label."""
    logits = torch.randn(4, vocabulary)
    logits[0, 3:] = -torch.inf
    logits[1, :7] = logits[1, 8:] = -torch.inf
    logits[2, 9] = -torch.inf
    logits[3, ::2] = torch.finfo(torch.float32).min
    targets = torch.tensor([1, 7, 9, 5])
    found = computed(logits, targets, kernel_device)
    expected = exact(logits, targets)
    torch.testing.assert_close(found[0].double(), expected[0])
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-12)
    assert found[0][1] == 0
    assert found[0][2] == torch.inf


@infinite
@pytest.mark.parametrize(
    ("value", "at"),
    [(float("nan"), 2), (float("nan"), 5), (float("inf"), 2), (float("inf"), 5)],
)
def test_what_is_no_number_stays_none(value: float, at: int, kernel_device: str) -> None:
    """In the label's column and in another, beside a row that is well."""
    logits, targets = torch.randn(2, 30), torch.tensor([5, 5])
    expected = exact(logits, targets)
    logits[0, at] = value
    losses, gradient = computed(logits, targets, kernel_device)
    assert losses[0].isnan()
    assert gradient[0].isnan().any()
    torch.testing.assert_close(losses[1].double(), expected[0][1])
    torch.testing.assert_close(gradient[1].double(), expected[1][1])


@pytest.mark.parametrize("target", [-1, -99, 30, 2**40])
def test_a_label_that_is_no_word(target: int, kernel_device: str) -> None:
    losses, gradient = computed(torch.randn(2, 30), torch.tensor([target, 5]), kernel_device)
    assert losses[0].isnan()
    assert gradient[0].isnan().all()
    assert losses[1].isfinite()


def test_columns_that_lie_apart_are_refused(kernel_device: str) -> None:
    logits = torch.randn(30, 2, device=kernel_device).mT
    with pytest.raises(ValueError, match=r"contiguous rows, got strides \(1, 2\); pass a copy"):
        cross_entropy_(
            logits, torch.tensor([1, 2]), torch.empty(2), scale=1.0, ignored=IGNORED, gradient=True
        )


def test_what_it_compiles_to(tmp_path: Path) -> None:
    """For every kind of GPU, aligned and not; the script names what breaks a rule."""
    run_uninterpreted(tmp_path, "compile_cross_entropy.py")
