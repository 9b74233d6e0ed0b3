"""No figure for a wrong rival: right rivals pass, every kind of wrong one is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.harness.rows import Refusal, values_of
from benchmarks.projector.cases import TINY, Case, draw, rotating_sets
from benchmarks.projector.checks import CorrectnessCheck
from benchmarks.projector.measure import TINY as TINY_SETTINGS
from benchmarks.projector.measure import measure_case
from benchmarks.projector.rivals import RIVALS, Rival, select
from benchmarks.projector.rivals.layer import Layer
from benchmarks.projector.rivals.methods import METHODS
from benchmarks.projector.rivals.plain import adapted, formula, materialised
from prodial_kernels.testing import LinearCase

CASE = TINY[0]


def without_scale(x: Tensor, w: Tensor, blocks: Tensor, scale: Tensor, *rest: object) -> Tensor:
    return formula(x, w, blocks, torch.ones_like(scale) + 0 * scale, *rest)


def twice_alpha(*operands: object) -> Tensor:
    *parts, alpha = operands
    return formula(*parts, 2 * alpha)


def no_gradient_to_the_diagonal(
    x: Tensor, w: Tensor, blocks: Tensor, scale: Tensor, *rest: object
) -> Tensor:
    return formula(x, w, blocks.detach() + 0 * blocks, scale, *rest)


def not_a_number(*operands: object) -> Tensor:
    return formula(*operands) * torch.nan


def transposed(*operands: object) -> Tensor:
    return formula(*operands).flip(0)


WRONG: tuple[Callable[..., Tensor], ...] = (
    without_scale, twice_alpha, no_gradient_to_the_diagonal, not_a_number, transposed,
)  # fmt: skip


@pytest.mark.parametrize("function", WRONG, ids=lambda function: function.__name__)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_rival_is_refused(function: Callable[..., Tensor], dtype: str) -> None:
    check = CorrectnessCheck(replace(CASE, dtype=dtype), "cpu")
    with pytest.raises(Refusal, match=r"relative error .* allowed"):
        check.errors_of(Rival("wrong", "ProDiaL", adapted(function)))


def test_a_refused_rival_gets_no_figure() -> None:
    wrong = Rival("wrong", "ProDiaL", adapted(without_scale))
    floor, refused = measure_case(CASE, (*select(["frozen"]), wrong), "cpu", TINY_SETTINGS)
    assert floor.status == "ok"
    assert floor.both_us > 0
    assert refused.status.startswith("refused: output: relative error")
    assert not any(
        name in values_of(refused) for name in ("both_us", "ratio", "tflops", "kept_mib")
    )


def test_a_rival_that_trains_less_is_refused() -> None:
    def prepare(case: LinearCase) -> Layer:
        layer = adapted(formula)(case)
        less = {name: leaf for name, leaf in layer.trained.items() if name != "scale"}
        return Layer(layer.forward, less)

    with pytest.raises(Refusal, match="expected output, d_x, d_blocks, d_scale"):
        CorrectnessCheck(CASE, "cpu").errors_of(Rival("wrong", "ProDiaL", prepare))


def test_a_case_of_which_nothing_runs_has_its_reasons() -> None:
    def prepare(case: LinearCase) -> Layer:
        raise RuntimeError("out of everything")

    warm = replace(TINY_SETTINGS, warm_s=0.01)
    (row,) = measure_case(CASE, (Rival("broken", "ProDiaL", prepare),), "cpu", warm)
    assert row.status == "failed: RuntimeError: out of everything"


def test_a_rival_that_fails_does_not_end_the_run() -> None:
    def prepare(case: LinearCase) -> Layer:
        raise RuntimeError("out of everything")

    failed, floor = measure_case(
        CASE, (Rival("broken", "ProDiaL", prepare), *select(["frozen"])), "cpu", TINY_SETTINGS,
    )  # fmt: skip
    assert failed.status == "failed: RuntimeError: out of everything"
    assert floor.ratio == 1


def test_a_missing_package_is_said() -> None:
    row = measure_case(
        CASE,
        (*select(["frozen"]), Rival("absent", "LoRA", METHODS["LoRA"], requires="no_such_module")),
        "cpu", TINY_SETTINGS,
    )[1]  # fmt: skip
    assert row.status == ("unavailable: no_such_module is not installed (pip install '.[bench]')")


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.name)
@pytest.mark.parametrize("p", [1, 12])
def test_every_rival_passes(rival: Rival, p: int) -> None:
    errors = CorrectnessCheck(replace(CASE, p=p), "cpu").errors_of(rival)
    assert errors.output < 1e-5
    assert errors.gradient < 1e-5


def test_rounding_the_weight_is_no_reason_to_refuse() -> None:
    case = Case(64, 48, 64, p=12, dtype="bfloat16")
    errors = CorrectnessCheck(case, "cpu").errors_of(Rival("mat", "ProDiaL", adapted(materialised)))
    assert 1e-3 < errors.output < 1e-2


def test_operands_repeat_with_the_seed_only() -> None:
    first, again, other = (draw(CASE, "cpu", seed).x for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_operand_sets_outgrow_the_cache() -> None:
    cache = 50 * 2**20
    small, large = Case(2048, 768, 3072), Case(16384, 2048, 8192)
    assert rotating_sets(large, cache) == 2
    assert rotating_sets(small, cache) * 2 * (2048 * 768 + 768 * 3072 + 2 * 2048 * 3072) > 2 * cache
