"""Ranks that library products take over: what is kept, scales of 0, and what dropout changes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from prodial_kernels.kernels.projector import passes
from prodial_kernels.ops import detours
from prodial_kernels.testing import LinearCase, make_case
from support.kernels.channel_first import LAYOUTS, run
from support.kernels.kernel_cases import assert_matches_fp64, triton_linear, watch


@pytest.mark.parametrize("r", [64, 65])
def test_a_wide_rank_keeps_neither_y_nor_h(kernel_device: str, r: int) -> None:
    case = make_case(24, 32, 48, block_size=4, r=r, device=kernel_device)
    case = case.cast(torch.float16, torch.float32)
    leaves = {name: getattr(case, name).requires_grad_() for name in case.TRAINED}
    y = triton_linear(replace(case, **leaves))
    kept = [t for t in y.grad_fn.saved_tensors if t is not None]
    alike = [t.shape for t in kept if t.dtype == torch.float16]
    assert (y.shape in alike) is (r == 64)
    assert (torch.Size([24, 64]) in alike) is (r == 64)


def assert_every_part_matches(case: LinearCase) -> LinearCase:
    """Compare all gradients, each alone, and without a part; return the case, with zeros in s."""
    rows = torch.arange(40, device=case.x.device)
    case = replace(case, scale=torch.where(rows % 3 == 0, 0.0, case.scale))
    assert_matches_fp64(case, compute=torch.float16)
    for name in case.TRAINED:
        assert_matches_fp64(case, compute=torch.float16, trained=[name])
    for absent in ("blocks", "scale", "bias"):
        assert_matches_fp64(replace(case, **{absent: None}), compute=torch.float16)
    return case


def test_every_scale_and_every_part_alone(kernel_device: str) -> None:
    case = make_case(33, 24, 40, block_size=6, r=70, device=kernel_device)
    assert_every_part_matches(case)


@pytest.mark.parametrize("r", [65, 100, 128])
def test_thin_products_where_the_weight_is_large(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch, r: int
) -> None:
    monkeypatch.setattr(detours, "LEAST_THIN", 1)
    case = make_case(33, 24, 40, block_size=6, r=r, device=kernel_device)
    assert detours.is_thin(case.operands)
    assert not detours.is_thin(case.operands._replace(lora_a=torch.empty(129, 24)))
    case = assert_every_part_matches(case)
    leaves = {name: getattr(case, name).float().requires_grad_() for name in ("scale", "lora_b")}
    y = triton_linear(replace(case.cast(torch.float16, torch.float32), **leaves))
    kept = [t.shape for t in y.grad_fn.saved_tensors if t is not None]
    assert y.shape in kept
    assert torch.Size([33, 128]) in kept


@pytest.mark.parametrize(
    ("r", "k", "inside"), [(65, 24, True), (128, 24, True), (200, 24, False), (70, 20, False)]
)
def test_the_product_adds_h_where_it_holds_it(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch, r: int, k: int, inside: bool
) -> None:
    made: list[bool] = []
    watch(
        monkeypatch, passes, "launch_gemm",
        lambda *_, **options: made.append(options.get("outer") is not None),
    )  # fmt: skip
    case = make_case(33, k, 40, block_size=4, r=r, device=kernel_device)
    for changes in ({}, {"bias": None}, {"blocks": None}, {"blocks": None, "scale": None}):
        made.clear()
        assert_matches_fp64(replace(case, **changes), compute=torch.float16)
        assert made[0] is inside


def test_thin_products_of_channel_first_operands(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detours, "LEAST_THIN", 1)
    case = make_case((2, 16), 24, 40, block_size=6, r=70, device=kernel_device)
    for layout in LAYOUTS:
        assert_matches_fp64(case, compute=torch.float16, function=partial(run, *layout))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_kernels_carry_it_with_dropout(
    kernel_device: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bool] = []
    forward = passes.forward
    monkeypatch.setattr(
        passes, "forward", lambda *a: (given.append(a[1].lora_a is not None), forward(*a))[1]
    )
    case = make_case(8, 24, 40, block_size=6, r=70, device=kernel_device)
    triton_linear(replace(case.cast(torch.float16, torch.float32), lora_dropout=dropout))
    assert given == [dropout > 0]
