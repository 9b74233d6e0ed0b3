"""Blocks that share a graph, and what gives each one of its own."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels.captured import CaptureWarning, program
from prodial_kernels.captured.model import capture_with
from prodial_kernels.captured.program import Program, Record
from support.captured.models import LAYERS, adapted
from support.captured.standin import StandIn
from support.captured.steps import checkpointing, gradients, same, step, warmed
from support.models import token_ids


def both(model: nn.Module) -> tuple[nn.Module, StandIn]:
    """What a model is compared with; it is replayed as one graph by now, and nothing was read."""
    plain = copy.deepcopy(model)
    engine = warmed(model)
    step(model, token_ids())
    model.zero_grad()
    assert [section.blocks for section in engine.captured] == [LAYERS]
    return plain, engine


def then_on_its_own(model: nn.Module, plain: nn.Module, engine: StandIn, **options: Any) -> None:
    """From the next step but two on, each block is replayed on its own."""
    before = engine.forwards
    for seed in (3, 4, 5):
        model.zero_grad()
        step(model, token_ids(seed=seed), **options)
    assert [section.blocks for section in engine.captured] == [1] * LAYERS
    assert engine.forwards == before + LAYERS
    plain.zero_grad()
    step(plain, token_ids(seed=5), **options)
    same(gradients(model), gradients(plain))


def test_hidden_states_that_are_kept_separate_the_blocks() -> None:
    model = adapted()
    plain, engine = both(model)
    results = []
    for run in (model, plain):
        options = {"labels": token_ids(), "output_hidden_states": True}
        if run is model:
            with pytest.warns(CaptureWarning, match="block 2, .* is kept: from now on each block"):
                output = run(token_ids(), **options)
        else:
            output = run(token_ids(), **options)
        (output.loss + output.hidden_states[1].pow(2).mean()).backward()
        results.append(output.hidden_states)
        del output
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
    same(gradients(model), gradients(plain))
    del results, found, expected
    then_on_its_own(model, plain, engine)


def test_a_result_that_is_read_separates_the_blocks() -> None:
    class Mean(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad(), torch.autocast("cpu"):
                seen.append(float(args[0].mean()))
            return self.block(*args, **kwargs)

    model = adapted(dropout=0.3)
    plain, engine = both(model)
    seen: list[float] = []
    for run in (model, plain):
        layers = run.backbone.layers
        reading = Mean()
        reading.block = layers[2]
        layers[2] = reading
        reading.train()
        torch.manual_seed(4)
        if run is model:
            with pytest.warns(CaptureWarning, match="is read before the next one: from now on"):
                found = step(run, token_ids(seed=3))
        else:
            assert torch.equal(found, step(run, token_ids(seed=3)))
    assert seen[0] == seen[1]
    assert engine.forwards == LAYERS
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_that_come_later_separate_the_blocks(kind: str) -> None:
    model = adapted()
    plain, engine = both(model)
    seen: list[Any] = []
    for run in (model, plain):
        register = getattr(run.backbone.layers[2], f"register_{kind}_hook")
        register(lambda *args: seen.append(1) or None)
    with pytest.warns(CaptureWarning, match="hooks by now: from now on each block"):
        step(model, token_ids(seed=3))
    step(plain, token_ids(seed=3))
    same(gradients(model), gradients(plain))
    assert len(seen) == 2
    with warnings.catch_warnings():
        if kind == "full_backward":
            warnings.simplefilter("ignore", CaptureWarning)
            return
        then_on_its_own(model, plain, engine)


def test_a_hook_between_blocks_divides_them() -> None:
    model = adapted()
    model.backbone.layers[1].register_forward_hook(lambda *_: None)
    engine = warmed(model)
    step(model, token_ids())
    assert [section.blocks for section in engine.captured] == [1, 1, 2]
    assert engine.forwards == engine.backwards == LAYERS


def test_a_block_given_other_tensors_than_the_one_before_runs_as_it_is() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
            return torch.tanh(self.linear(hidden)) * mask

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(4))

        def forward(self, hidden: Tensor, masks: list[Tensor]) -> Tensor:
            for layer, mask in zip(self.layers, masks, strict=True):
                hidden = layer(hidden, mask)
            return hidden.pow(2).sum()

    model = Model()
    plain = copy.deepcopy(model)
    engine = StandIn()
    with capture_with(model, engine):
        for _ in range(4):
            x, first = torch.randn(2, 3, 4), torch.rand(2, 3, 4)
            masks = [first] * 4
            for run in (model, plain):
                run.zero_grad()
                run(x, masks).backward()
            same(gradients(model), gradients(plain))
        assert engine.forwards == 8
        masks = [first, first, torch.rand(2, 3, 4), first]
        with pytest.warns(CaptureWarning, match="another tensor than the block before"):
            model(x, masks).backward()
        plain(x, masks).backward()
        same(gradients(model), gradients(plain))


def test_hooks_of_blocks_run_around_the_graphs() -> None:
    model = adapted()
    warmed(model)
    seen = []
    block = model.backbone.layers[2]
    block.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    block.register_full_backward_hook(lambda module, given, found: seen.append(found[0].clone()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        step(model, token_ids())
    assert len(seen) == 2
    assert not any(tensor.isnan().any() for tensor in seen)


def test_a_cache_in_training_is_said() -> None:
    model = adapted()
    capture_with(model, StandIn())
    with pytest.warns(CaptureWarning, match="'cache.*' is or holds a DynamicCache"):
        model(token_ids(), use_cache=True)


def test_saved_tensor_hooks_are_said() -> None:
    model = adapted()
    engine = warmed(model)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        pytest.warns(CaptureWarning, match="hooks of saved tensors"),
    ):
        step(model, token_ids())
    assert engine.forwards == 0


def test_offloaded_activations_are_left_to_transformers() -> None:
    model = checkpointing(adapted())
    engine = StandIn()
    for block in model.backbone.layers[:2]:
        block._gradient_checkpointing_func = lambda function, *args: function(*args)
    capture_with(model, engine)
    step(model, token_ids())
    step(model, token_ids())
    with pytest.warns(
        CaptureWarning, match="block 0, .* and 1 more .* checkpoints by a function of its own"
    ):
        step(model, token_ids())
    assert engine.forwards == LAYERS - 2


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["", "dropout"])
def test_the_first_of_many_blocks_are_recomputed(
    monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    monkeypatch.setattr(program, "RECOMPUTED_FROM", LAYERS)
    monkeypatch.setattr(program, "RECOMPUTED", 2)
    model = adapted(dropout=dropout)
    plain = copy.deepcopy(model)
    engine = warmed(model)
    torch.manual_seed(3)
    found = [step(model, token_ids(seed=n)) for n in range(3)], gradients(model)
    torch.manual_seed(3)
    expected = [step(plain, token_ids(seed=n)) for n in range(3)], gradients(plain)
    assert found[0] == expected[0]
    same(found[1], expected[1])
    assert [(one.blocks, one.checkpointed) for one in engine.captured] == [
        (2, True), (LAYERS - 2, False)
    ]  # fmt: skip
    assert engine.backwards == 3 * LAYERS


def test_what_blocks_hold_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks that each keep 100 bytes: those, and 100 for the first backward."""
    records = {n: Record(None, memory=(1000 + 100 * n, 1100 + 100 * n)) for n in range(3)}
    known = Program(records=records, order=[0, 1, 2])
    assert known.held() == 400
    monkeypatch.setattr(program, "RECOMPUTED_FROM", 3)
    monkeypatch.setattr(program, "RECOMPUTED", 2)
    assert known.held() == 200
    known.order = [0, 2]
    assert known.held() == 0
