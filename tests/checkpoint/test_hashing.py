"""The hash of a tensor: every value counts, and nothing but the values does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prodial_kernels.checkpoint import hashing
from prodial_kernels.checkpoint.hashing import hash_tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_it_is_what_is_written_to_files_for_ever() -> None:
    """A change of the definition would refuse every adapter there is."""
    counting = torch.arange(10_000, dtype=torch.int64)
    assert hash_tensor(counting) == "ccf5030cc91cf8e1d0a6a104851d4869"
    assert hash_tensor(torch.arange(1027).to(torch.bfloat16)) == "c6ebc0e6c5520a070d11359b93fe4cd8"
    assert hash_tensor(torch.zeros(0)) == "31a05edd8c4d05d0ff17f0c08adc14fe"


def test_sums_are_those_of_the_definition() -> None:
    words = torch.randint(-(2**63), 2**63 - 1, (3, 1024))
    low, high = hashing._multipliers(words.device)
    assert bool((low % 2 == 1).all())
    assert bool((high % 2 == 1).all())
    expected = [
        sum(w * m + (w >> 32) * n for w, m, n in zip(row, low.tolist(), high.tolist(), strict=True))
        % 2**64
        for row in words.tolist()
    ]
    assert [s % 2**64 for s in hashing._row_sums(words).tolist()] == expected
    # As on a device that has no products of matrices of integers.
    other = (words * low + (words >> 32) * high).sum(1)
    assert [s % 2**64 for s in other.tolist()] == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_change_shows(dtype: torch.dtype) -> None:
    weight = values(64, 96, dtype=dtype)
    seen = {hash_tensor(weight)}

    def check(changed: Tensor) -> None:
        seen.add(hash_tensor(changed))

    changes = 1
    for index in range(0, weight.numel(), 97):
        changed = weight.clone()
        changed.view(-1)[index] *= -1
        check(changed)
        changes += 1
    for change in (
        lambda w: -w, lambda w: w * 2, lambda w: w.flip(0), lambda w: w.flip(1),
        lambda w: w.reshape(96, 64), lambda w: w.reshape(-1), lambda w: w[:-1], lambda w: w[:, :-1],
        lambda w: w.roll(1, 0), lambda w: torch.zeros_like(w), lambda w: torch.ones_like(w),
    ):  # fmt: skip
        check(change(weight))
        changes += 1
    for column in range(96):
        changed = weight.clone()
        # Highest bits only, at the same place of many words.
        changed[:, column] *= -1
        check(changed)
        doubled = weight.clone()
        doubled[:, column] *= 2
        check(doubled)
        changes += 2
    assert len(seen) == changes


@pytest.mark.parametrize(
    "dtype", [*DTYPES, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (5, 7, 11), (1025,), (129, 1024)])
def test_layout_does_not_matter(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    expected = hash_tensor(tensor)
    padded = torch.zeros((*shape, 2)).to(dtype)
    padded[..., 0] = tensor
    assert hash_tensor(padded[..., 0]) == expected
    # From an address that is no multiple of eight.
    longer = torch.zeros(tensor.numel() + 1).to(dtype)
    longer[1:] = tensor.reshape(-1)
    assert hash_tensor(longer[1:].view(shape)) == expected
    with torch.inference_mode():
        assert hash_tensor(tensor.clone()) == expected
    assert hash_tensor(tensor.view(*shape, 1)) != expected
