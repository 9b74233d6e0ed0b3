"""Rows trained at once are the rows trained one by one: the same losses, to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.quality.bases.shapes import Base, build
from benchmarks.quality.methods.registry import METHODS, SETS
from benchmarks.quality.side_by_side import mamba1, mamba2, vim
from benchmarks.quality.side_by_side.fused import between as fused
from benchmarks.quality.side_by_side.language import language_of
from benchmarks.quality.side_by_side.learner import Learner
from benchmarks.quality.side_by_side.mamba2 import between
from benchmarks.quality.side_by_side.stacked import weights_of
from benchmarks.quality.side_by_side.train import Member, Stack
from benchmarks.quality.side_by_side.vision import vision_of
from benchmarks.quality.side_by_side.weights import method_of
from benchmarks.quality.study.language import LanguageData
from benchmarks.quality.study.row import Recipe, Spec
from benchmarks.quality.study.train import Data, data_of, run_row
from benchmarks.quality.study.vision import VisionData
from benchmarks.quality.tasks.task import ImageTask, TextExample, TextTask
from support.kernels.uninterpreted import run_uninterpreted
from support.tiny_model import byte_tokenizer

CPU = torch.device("cpu")
RECIPE = Recipe(steps=6, batch_size=4, max_length=16)


@pytest.fixture(scope="module", params=["mamba1-toy", "mamba2-toy"])
def base(request: pytest.FixtureRequest) -> Base:
    model = build(request.param, 264).eval()
    with torch.no_grad():
        # Of random weights out_proj is near zero, where methods could not be told apart.
        for layer in model.backbone.layers:
            layer.mixer.out_proj.weight.mul_(4)
    return Base("toy", "language", model, byte_tokenizer(), {})


@pytest.fixture(scope="module")
def task() -> TextTask:
    def examples(count: int, first: int) -> list[TextExample]:
        return [
            TextExample("abc"[: 1 + i % 3] + "xyz"[i * first % 3], (" on", " of", " sixty"), i % 3)
            for i in range(count)
        ]

    task = TextTask("letters", {}, True)
    task.splits = {"train": examples(20, 1), "validation": examples(12, 2), "test": []}
    return task


def test_the_plain_model_is_the_same(base: Base) -> None:
    ids = torch.randint(0, 264, (3, 2, 11), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(11).expand(3, 2, 11)
    weights = weights_of(base.model)
    if base.model.config.model_type == "mamba":
        mine = mamba1.forward(mamba1.shape_of(base.model), weights, ids, positions)
    else:
        mine = mamba2.forward(mamba2.shape_of(base.model), weights, ids, positions)
    with torch.no_grad():
        theirs = base.model(input_ids=ids.flatten(0, 1), use_cache=False).logits
    torch.testing.assert_close(mine.flatten(0, 1), theirs, rtol=1e-4, atol=1e-5)


def test_every_method_gives_the_losses_of_rows_alone(base: Base, task: TextTask) -> None:
    data = data_of(base, task, RECIPE, CPU)
    names = list(SETS["core"])
    shape: Any = mamba1 if base.model.config.model_type == "mamba" else mamba2
    if shape is mamba1:
        names += ["ft-both", "ft-ssm"]
    else:
        names += [*SETS["placement"], *SETS["component"], "t-free", "t-centric"]
    members = []
    for name in names:
        budget = "own" if METHODS[name].own_size else "small"
        seeds = ((1, METHODS[name].rates[1]), (2, METHODS[name].rates[3]))
        for seed, rate in seeds[: 1 + (shape is mamba2)]:
            spec = Spec("toy", "letters", name, budget, rate, seed, RECIPE)
            members.append(Member(spec, *method_of(base.model, name, budget, seed)))
    assert len(members) > 15
    assert isinstance(data, LanguageData)
    learner = language_of(shape.shape_of(base.model), data, 0, 64, splits=("validation",))
    compare(base, data, learner, members)


def compare(base: Base, data: Data, learner: Learner, members: list[Member]) -> None:
    """Hold a stack's rows to those of ``run_row``."""
    stack = Stack(learner, weights_of(base.model), members)
    trained = stack.train()
    accuracy = stack.accuracy("validation")
    for i, member in enumerate(stack.members):
        row = run_row(base, data, member.spec, "sweep", CPU)
        where = f"{member.spec.method} seed {member.spec.seed}"
        expected = row.figures.get("loss")
        if expected is not None:
            assert trained.losses[i] == pytest.approx(expected, rel=2e-4), where
        assert accuracy[i] == pytest.approx(row.figures["validation"], abs=1e-6), where
        assert member.start.figures["parameters"] == row.figures["parameters"], where


def test_every_method_gives_the_losses_of_vision_rows_alone() -> None:
    model = build("vim-toy", 5).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("out_proj.weight"):
                parameter.mul_(8)
    base = Base("toy", "vision", model, None, {})
    generator = np.random.default_rng(0)
    splits = {
        split: (
            generator.integers(0, 256, (count, 1, 32, 32), dtype=np.uint8),
            generator.integers(0, 3, count),
        )
        for split, count in (("train", 14), ("validation", 9), ("test", 1))
    }
    task = ImageTask("shapes", {}, ("a", "b", "c"), splits)
    recipe = Recipe(steps=3, batch_size=4)
    data = data_of(base, task, recipe, CPU)
    assert isinstance(data, VisionData)
    members = []
    for name in (*SETS["core"], "ft-both", "ft-ssm", "ft-embeddings", "t-centric"):
        budget = "own" if METHODS[name].own_size else "small"
        spec = Spec("toy", "shapes", name, budget, METHODS[name].rates[1], 1, recipe)
        members.append(Member(spec, *method_of(model, name, budget, 1, 3)))
    compare(base, data, vision_of(vim.shape_of(model), data, 0), members)


@pytest.mark.parametrize("own", [True, False], ids=["own weights", "shared weights"])
def test_the_kernels_compute_what_lies_between_projectors(own: bool) -> None:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    runs, heads, head, states, length = 2, 2, 16, 16, 19
    inner, channels, lead = heads * head, heads * head + 2 * states, 2 if own else 1
    x = random(runs, 2, length, 2 * inner + 2 * states + heads)
    small = [random(lead, channels, 1, 4), random(lead, channels), random(lead, heads),
             random(lead, heads), random(lead, heads), random(lead, inner)]  # fmt: skip
    seed = random(runs, 2, length, inner)
    found = []
    for function, dtype in ((between, torch.float64), (between, torch.float32), (fused, None)):
        leaves = [t.to(dtype or torch.float32).requires_grad_(own or t is x) for t in (x, *small)]
        out = function(*leaves, states, 1e-5)
        (out * seed).sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    assert len(found[0]) == (8 if own else 2)
    for exact, eager, mine in zip(*found, strict=True):
        assert exact is not None
        assert eager is not None
        assert mine is not None
        worst = (mine - exact).abs().max()
        assert worst <= 4 * (eager - exact).abs().max() + 1e-6 * exact.abs().max()


def test_the_kernels_compile(tmp_path: Path) -> None:
    """The interpreter takes Python that the compiler refuses."""
    run_uninterpreted(tmp_path, "../quality/compile_between.py")
