"""The study's methods: what each trains, that it starts at the base, and budgets."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from benchmarks.quality.bases.shapes import build
from benchmarks.quality.methods.budgets import BUDGETS, budget_of, fit, projectors
from benchmarks.quality.methods.method import Unfit
from benchmarks.quality.methods.registry import METHODS, SETS, adapt

BASES = {"mamba1-toy": 48, "mamba2-toy": 48, "hybrid-toy": 48, "vim-toy": 5}


@pytest.fixture(scope="module")
def bases() -> dict[str, Any]:
    return {name: build(name, outputs).eval() for name, outputs in BASES.items()}


def output_of(model: Any, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if name == "vim-toy":
        return model.features(torch.rand(2, 3, 32, 32, generator=generator))
    ids = torch.randint(0, 48, (2, 20), generator=generator)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_starts_at_the_base_and_every_parameter_gets_a_gradient(
    method: str, base: str, bases: dict[str, Any]
) -> None:
    model = copy.deepcopy(bases[base])
    classes = 7 if base == "vim-toy" else None
    budget = "own" if METHODS[method].own_size else "small"
    torch.manual_seed(0)
    try:
        counts = adapt(model, method, budget, classes)
    except Unfit:
        assert (method, base) in UNFIT
        return
    assert (method, base) not in UNFIT
    expected = output_of(bases[base], base)
    # IA3 and VeRA compute other products; they start at ones and zeros all the same.
    torch.testing.assert_close(output_of(model, base), expected, atol=2e-5, rtol=1e-4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == counts["parameters"] + counts["head"]
    if method == "none":
        assert set(trained) <= {"head.weight", "head.bias"}
        return
    output = model(torch.rand(2, 3, 32, 32)) if classes else output_of(model, base)
    output.float().square().sum().backward()
    missing = [name for name, p in trained.items() if p.grad is None]
    assert missing == []


# What a base has not: attention, or states that more can be added to.
UNFIT = {
    (method, base)
    for method in ("lora-attention", "prodial-attention", "lora-all", "prodial-all")
    for base in ("mamba1-toy", "mamba2-toy", "vim-toy")
} | {("additional-scan", "mamba2-toy"), ("additional-scan", "hybrid-toy")}


@pytest.mark.parametrize("base", ["mamba1-toy", "vim-toy"])
def test_what_is_frozen_stays(base: str, bases: dict[str, Any]) -> None:
    model = copy.deepcopy(bases[base])
    adapt(model, "ft-out", "own", 7 if base == "vim-toy" else None)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "out_proj" not in name} <= {"head.weight", "head.bias"}
    assert any("out_proj" in name for name in trained)


def test_the_off_diagonal_transform_keeps_its_diagonal(bases: dict[str, Any]) -> None:
    model = copy.deepcopy(bases["mamba2-toy"])
    adapt(model, "t-offdiagonal", "own")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    output_of(model, "mamba2-toy").square().sum().backward()
    optimizer.step()
    for p in parameters:
        assert p.diagonal(dim1=-2, dim2=-1).abs().max() == 0
        assert p.abs().max() > 0


@pytest.mark.parametrize("budget", BUDGETS)
def test_budgets_are_met_at_the_bases_sizes(budget: str) -> None:
    # Of mamba2-31m: 16 layers of in_proj 512 -> 2192 and out_proj 1024 -> 512.
    shapes = [(512, 2192), (1024, 512)] * 16
    target = BUDGETS[budget] * sum(i + o for i, o in shapes)
    for scale in (True, False):
        for blocks in ("one", "larger", None):
            knobs = fit(shapes, target, scale=scale, blocks=blocks)
            assert abs(knobs.parameters / target - 1) < 0.05, (scale, blocks, knobs)
            if blocks == "larger":
                assert knobs.block >= 2
    assert fit(shapes, target, scale=True, blocks="one").r == BUDGETS[budget] - 1


def test_the_budget_is_a_lora_on_both_projectors(bases: dict[str, Any]) -> None:
    model = copy.deepcopy(bases["mamba1-toy"])
    assert projectors(model, ["in_proj"]) == [(32, 128)] * 2
    target = budget_of(model, "small")
    counts = adapt(model, "lora", "small")
    assert counts["parameters"] == counts["target"] == target == 2 * 8 * (32 + 128 + 64 + 32)


def test_sets_name_methods_and_every_sweep_has_four_rates() -> None:
    assert {name for names in SETS.values() for name in names} <= METHODS.keys()
    assert {len(method.rates) for method in METHODS.values()} == {4}


def test_a_budget_that_a_method_does_not_take_is_refused(bases: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="full takes own, got 'small'"):
        adapt(copy.deepcopy(bases["mamba2-toy"]), "full", "small")
    with pytest.raises(ValueError, match="expected one of none, lora"):
        adapt(copy.deepcopy(bases["mamba2-toy"]), "nothing", "own")
