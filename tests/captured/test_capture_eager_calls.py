"""Which calls of captured blocks run eagerly, and what is said of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from prodial_kernels import AffixTuning, PromptTuning, apply_methods
from prodial_kernels.captured import CaptureWarning
from prodial_kernels.captured.model import capture_with
from support.captured.models import LAYERS, adapted
from support.captured.standin import StandIn
from support.captured.steps import gradients, same, step, warmed
from support.models import build, token_ids


def test_another_shape_is_captured_too_until_there_are_too_many() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    engine = StandIn()
    captured = capture_with(model, engine)
    for length in (5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7, 8):
        step(model, token_ids(length=length))
    assert engine.captures == 4
    assert "[2, 8]: 4 of 4" in str(captured)
    model.zero_grad()
    with pytest.warns(CaptureWarning, match=r"a batch of \[2, 9\] is launched as before: 4 kinds"):
        found = step(model, token_ids(length=9))
    step(model, token_ids(length=10))  # said once
    model.zero_grad()
    found = step(model, token_ids(length=9))
    assert torch.equal(found, step(plain, token_ids(length=9)))
    same(gradients(model), gradients(plain))


def test_only_the_shape_that_was_asked_for() -> None:
    model = adapted()
    engine = StandIn()
    with capture_with(model, engine, batch_size=2, seq_len=7):
        with pytest.warns(CaptureWarning, match=r"\[1, 7\] .* asked for batch_size=2"):
            step(model, token_ids(batch=1))
        for _ in range(3):
            step(model, token_ids())
            step(model, token_ids(batch=1))
    assert engine.captures == 1
    assert engine.forwards == LAYERS


def test_evaluation_and_generation_are_not_replayed() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    engine = warmed(model)
    step(model, token_ids())
    for run in (model, plain):
        run.eval()
    assert torch.equal(model(token_ids()).logits, plain(token_ids()).logits)
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(
        model.generate(token_ids(), **options), plain.generate(token_ids(), **options)
    )
    model.train()
    with torch.no_grad():
        model(token_ids())
    assert engine.forwards == LAYERS
    model.zero_grad()
    step(model, token_ids())
    assert engine.forwards == 2 * LAYERS


def test_two_forwards_before_a_backward() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    engine = warmed(model)
    with pytest.warns(CaptureWarning, match="an earlier one still waits for its backward"):
        losses = [model(token_ids(seed=s), labels=token_ids(seed=s)).loss for s in (3, 4)]
    sum(losses).backward()
    expected = [plain(token_ids(seed=s), labels=token_ids(seed=s)).loss for s in (3, 4)]
    sum(expected).backward()
    same(gradients(model), gradients(plain))
    assert engine.forwards == LAYERS
    del losses
    step(model, token_ids())
    assert engine.forwards == 2 * LAYERS


def test_a_forward_without_a_backward_is_no_obstacle_once_it_is_gone() -> None:
    model = adapted()
    engine = warmed(model)
    model(token_ids())
    step(model, token_ids())
    assert engine.forwards == 2 * LAYERS


def test_a_second_backward_is_refused() -> None:
    model = adapted()
    warmed(model)
    loss = model(token_ids(), labels=token_ids()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second backward through blocks 0 to 3 \(Mamba2Block"):
        loss.backward()


def test_a_backward_out_of_order_is_refused() -> None:
    model = adapted()
    warmed(model, together=False)
    output = model(token_ids(), labels=token_ids(), output_hidden_states=True)
    with pytest.raises(RuntimeError, match="before that through block 3"):
        output.hidden_states[1].sum().backward()


def test_a_gradient_of_a_gradient_is_refused() -> None:
    model = adapted()
    warmed(model)
    loss = model(token_ids(), labels=token_ids()).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.pow(2).sum() for g in found).backward()


def test_what_waits_for_the_device_is_left_out() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    engine = StandIn()

    def watched(function: Callable[[], Any]) -> Any:
        index = len(seen)
        seen.append(index)
        return function(), ["experts.py:7"] if index == 1 else []

    seen: list[int] = []
    engine.watched = watched  # type: ignore[method-assign]
    capture_with(model, engine)
    step(model, token_ids())
    step(model, token_ids())
    model.zero_grad()
    with pytest.warns(CaptureWarning, match=r"block 1, .* waits for the device in experts.py:7"):
        step(model, token_ids(seed=3))
    step(plain, token_ids(seed=3))
    same(gradients(model), gradients(plain))
    assert engine.forwards == engine.backwards == LAYERS - 1


def test_changing_what_runs_between_blocks() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    engine = warmed(model, together=False)
    step(model, token_ids())
    for run in (model, plain):
        run.backbone.layers[1].register_forward_hook(lambda module, args, output: output * 2)
        run.zero_grad()
    with pytest.warns(CaptureWarning, match="block 2, .* is not what the block before returned"):
        step(model, token_ids(seed=3))
    step(plain, token_ids(seed=3))
    same(gradients(model), gradients(plain))
    assert engine.forwards == LAYERS + 2


@pytest.mark.parametrize("mlp", [False, True], ids=["tokens", "network"])
def test_affix_tuning_trains_all_that_it_reads(mlp: bool) -> None:
    """A network outside the blocks would get no gradient from a graph of one."""
    model = build("mamba")
    apply_methods(model, [AffixTuning(2, mlp=mlp), PromptTuning(2)])
    plain = copy.deepcopy(model)
    engine = warmed(model)
    if mlp:
        with pytest.warns(CaptureWarning, match="it reads affix-tuning's network"):
            found = step(model, token_ids())
    else:
        found = step(model, token_ids())
        assert engine.forwards
    expected = step(plain, token_ids())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(model), gradients(plain))
