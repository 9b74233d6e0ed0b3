"""Weights that are nothing beside their activations: W' in either direction, gradients from F."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from prodial_kernels.kernels.choices import small_weight
from prodial_kernels.kernels.choices.tile_sizes import DeviceLimits
from prodial_kernels.kernels.projector import outer_product, passes, reduce, small_passes
from prodial_kernels.kernels.replay import recorded_calls
from prodial_kernels.testing import LinearCase, make_case
from support.kernels.kernel_cases import assert_matches_fp64, triton_linear, watch


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Any weight is small here; which way was taken, call by call."""
    monkeypatch.setattr(small_weight, "LEAST_TOKENS", 1)
    monkeypatch.setattr(small_weight, "EVEN", 1)
    seen: list[str] = []
    for module, name in ((passes, "kernels"), (small_passes, "small")):
        for direction in ("forward", "backward"):
            watch(
                monkeypatch, module, direction,
                lambda *_, name=name, direction=direction, **__: seen.append(f"{name} {direction}"),
            )  # fmt: skip
    recorded_calls.reset()
    return seen


SHAPES = [
    pytest.param((70,), 48, 40, 1, 4, id="P1-r4"),
    pytest.param((3, 67), 96, 35, 12, 17, id="P12-r17-ragged"),
    pytest.param((33,), 36, 67, 6, 64, id="P6-r64"),
    pytest.param((1,), 14, 13, 2, 2, id="M1"),
    pytest.param((1,), 16, 24, 1, 2, id="P1-M1"),
    pytest.param((130,), 192, 72, 1, 24, id="P1-r24-tail"),
    pytest.param((2, 67), 201, 35, 1, 16, id="P1-r16-ragged"),
]


@pytest.mark.parametrize("diagonal", ["relu", "free"])
@pytest.mark.parametrize(("tokens", "k", "n", "block_size", "r"), SHAPES)
def test_output_and_gradients_match_fp64(
    kernel_device: str, calls: list[str], tokens: tuple[int, ...], k: int, n: int,
    block_size: int, r: int, diagonal: str,
) -> None:  # fmt: skip
    case = make_case(
        tokens, k, n, block_size=block_size, r=r, diagonal=diagonal, device=kernel_device
    )
    assert_matches_fp64(case, compute=torch.float16)
    assert set(calls) == {"small forward", "small backward"}


def test_every_part_alone_and_absent(kernel_device: str, calls: list[str]) -> None:
    case = make_case(33, 24, 40, block_size=6, r=5, device=kernel_device)
    rows = torch.arange(40, device=kernel_device)
    case = replace(case, scale=torch.where(rows % 3 == 0, 0.0, case.scale))
    for name in case.TRAINED:
        assert_matches_fp64(case, compute=torch.float16, trained=[name])
    absent: list[dict[str, Any]] = [
        {"blocks": None}, {"scale": None}, {"bias": None}, {"lora_a": None, "lora_b": None},
        {"blocks": None, "scale": None, "lora_a": None, "lora_b": None},
    ]  # fmt: skip
    for parts in absent:
        assert_matches_fp64(replace(case, **parts), compute=torch.float16)
    assert set(calls) == {"small forward", "small backward"}


@pytest.mark.parametrize(
    ("m", "k", "n", "block_size"),
    [(700, 24, 40, 2), (520, 136, 16, 4), (300, 200, 72, 1), (330, 400, 24, 1)],
)
def test_several_splits_and_tiles(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch, m: int, k: int, n: int, block_size: int
) -> None:
    given: list[tuple[int, ...]] = []
    launch = outer_product.launch

    def see(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        given.append(grid)
        launch(kernel, grid, **arguments)

    monkeypatch.setattr(outer_product, "launch", see)
    case = make_case(m, k, n, block_size=block_size, r=3, device=kernel_device)
    assert_matches_fp64(case, compute=torch.float16)
    # Where dX is not asked for its memory is not there, and where it is, it is the limit.
    assert_matches_fp64(case, compute=torch.float16, trained=["scale", "lora_a", "lora_b"])
    tiles, splits = given[-1]
    assert tiles > 1 or block_size > 1
    assert splits > 1


def test_many_parts_are_added_up_by_more_programs(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduce, "MANY", 1)
    case = make_case(300, 24, 40, block_size=1, r=3, device=kernel_device)
    assert_matches_fp64(case, compute=torch.float16)


def test_sums_that_fp16_does_not_hold(kernel_device: str) -> None:
    case = make_case(600, 32, 48, block_size=1, r=4, device=kernel_device)
    x = case.x + 60
    case = replace(case, x=x, lora_a=case.lora_a / 64, grad_output=40 + case.grad_output)
    f = (case.grad_output.flatten(0, -2).T @ case.x.flatten(0, -2)).abs()
    assert f.min() > torch.finfo(torch.float16).max
    assert_matches_fp64(case, compute=torch.float16)


def test_two_runs_are_bit_equal(kernel_device: str) -> None:
    case = make_case(300, 48, 40, block_size=6, device=kernel_device)
    case = case.cast(torch.float16, torch.float32)
    first, second = case.run(triton_linear), case.run(triton_linear)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_neither_y_nor_h_is_kept(kernel_device: str) -> None:
    case = make_case(24, 32, 48, block_size=4, device=kernel_device)
    case = case.cast(torch.float16, torch.float32)
    leaves = {name: getattr(case, name).requires_grad_() for name in LinearCase.TRAINED}
    y = triton_linear(replace(case, **leaves))
    kept = [t.shape for t in y.grad_fn.saved_tensors if t is not None]
    assert y.shape not in kept
    assert torch.Size([24, 16]) not in kept
    y.mul_(2)  # as after nn.Linear


@pytest.mark.parametrize(
    "changes", [{"lora_dropout": 0.5}, {"channel_first": True}, {"r": 65}], ids=str
)
def test_what_it_does_not_hold_is_left_to_the_others(
    kernel_device: str, calls: list[str], changes: dict[str, Any]
) -> None:
    case = make_case((2, 16), 24, 40, block_size=6, r=changes.pop("r", 4), device=kernel_device)
    case = case.cast(torch.float16, torch.float32)
    leaves = {name: getattr(case, name).requires_grad_() for name in LinearCase.TRAINED}
    triton_linear(replace(case, **leaves), **changes).sum().backward()
    assert set(calls) == {"kernels forward", "kernels backward"}


def test_which_sums_a_tile_of_f_holds() -> None:
    limits = DeviceLimits((9, 0), 132)

    def choose(r_pad: int = 16, block_size: int = 1, *, tma: bool = True) -> Any:
        return small_weight.choose_sums(
            768, 192, r_pad=r_pad, block_size=block_size, tma=tma, limits=limits
        )

    assert (choose().rows, choose().columns) == (128, 64)
    assert (choose(32).rows, choose(32).columns) == (64, 64)
    assert not choose(tma=False).tma
    assert choose(64) is None
    assert choose(block_size=2) is None


@pytest.mark.parametrize(
    ("m", "n", "k", "small"),
    [
        (25216, 768, 192, True), (25216, 192, 384, True), (25216, 384, 768, True),
        (25216, 1536, 384, False),
        (25216, 764, 192, False), (2048, 768, 192, False), (16384, 3072, 768, False),
    ],
)  # fmt: skip
def test_which_weights_are_small(
    monkeypatch: pytest.MonkeyPatch, m: int, n: int, k: int, small: bool
) -> None:
    monkeypatch.undo()
    assert small_weight.is_small(m, n, k, r=16, block_size=1, dropout=False) is small
    assert not small_weight.is_small(m, n, k, r=65, block_size=1, dropout=False)
    assert not small_weight.is_small(m, n, k, r=16, block_size=1, dropout=True)
