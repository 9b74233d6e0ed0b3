"""A captured model that changes, is copied or released, and models that are refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from prodial_kernels import adapter_disabled, capture
from prodial_kernels.captured import Captured, CaptureError, CaptureWarning
from prodial_kernels.captured.model import capture_with
from support.captured.models import LAYERS, adapted
from support.captured.standin import StandIn
from support.captured.steps import gradients, release, same, step, warmed
from support.models import randomise_adapters, token_ids


def test_a_changed_model_is_captured_again() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    engine = warmed(model)
    step(model, token_ids())
    for run in (model, plain):
        run.zero_grad()
        run.backbone.layers[1].mixer.in_proj.prodial_scale.requires_grad_(False)
    with pytest.warns(CaptureWarning, match="block 1, .* requires_grad of a tensor was changed"):
        step(model, token_ids(seed=3))
    step(plain, token_ids(seed=3))
    same(gradients(model), gradients(plain))
    with pytest.warns(CaptureWarning, match="captured again"):
        step(model, token_ids())
    for _ in range(2):
        model.zero_grad()
        step(model, token_ids(seed=3))
    assert engine.captures == 2
    step(plain, token_ids(seed=3))
    same(gradients(model), gradients(plain))


def test_switched_off_adapters_are_off() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    warmed(model)
    step(model, token_ids())
    model.get_input_embeddings().requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        with adapter_disabled(model), adapter_disabled(plain):
            found = model(token_ids(seed=3)).logits
            assert torch.equal(found, plain(token_ids(seed=3)).logits)


def test_values_may_change_in_place() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    engine = warmed(model)
    for run in (model, plain):
        randomise_adapters(run, seed=9)
        run.load_state_dict({k: v * 1.5 for k, v in run.state_dict().items()})
    assert torch.equal(step(model, token_ids()), step(plain, token_ids()))
    same(gradients(model), gradients(plain))
    assert engine.forwards == LAYERS


def test_state_dicts_copies_and_pickles() -> None:
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    warmed(model)
    captured = model.captured
    del model.captured
    step(model, token_ids())
    assert list(model.state_dict()) == list(before)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.zero_grad()
        for block in other.backbone.layers:
            assert block.forward.owner is block
        expected = step(other, token_ids())
    model.zero_grad()
    assert torch.equal(step(model, token_ids()), expected)
    same(gradients(model), gradients(other))
    captured[0].release()
    captured[0].release()
    assert not any("forward" in vars(block) for block in model.backbone.layers)


def test_release_gives_a_forward_of_the_blocks_own_back() -> None:
    model = adapted()
    block = model.backbone.layers[1]
    own = block.forward
    calls = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    block.forward = forward
    engine = StandIn()
    with capture_with(model, engine) as captured:
        assert "none of 4 yet" in str(captured)
        for _ in range(3):
            step(model, token_ids())
        assert engine.forwards == LAYERS
    assert block.forward is forward
    assert len(calls) == 4  # twice as it was, once captured, once again for want of a graph
    assert engine.released == 1


def test_a_backward_after_release_still_works() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    warmed(model)
    loss = model(token_ids(), labels=token_ids()).loss
    release(model)
    loss.backward()
    step(plain, token_ids())
    same(gradients(model), gradients(plain))


def test_refusals() -> None:
    model = adapted()
    with pytest.raises(CaptureError, match="expected one on a CUDA device, got one on 'cpu'"):
        capture(model)
    with pytest.raises(CaptureError, match="batch_size must be at least 1, got 0"):
        capture_with(model, StandIn(), batch_size=0)
    with pytest.raises(CaptureError, match=r"no nn\.ModuleList of blocks to capture"):
        capture_with(nn.Linear(2, 2), StandIn())
    with capture_with(model, StandIn()), pytest.raises(CaptureError, match="captured already"):
        capture_with(model, StandIn())
    with pytest.raises(CaptureError, match="on 'meta'"):
        capture_with(copy.deepcopy(model).to("meta"), StandIn())
    model.backbone.layers[0]._hf_hook = object()
    with pytest.raises(CaptureError, match="accelerate moves"):
        capture_with(model, StandIn())


def test_what_is_not_whole_in_one_process_is_refused() -> None:
    model = adapted()
    with pytest.raises(CaptureError, match="DataParallel, which is not captured; run one process"):
        capture_with(nn.DataParallel(model), StandIn())
    sharded = type("FullyShardedDataParallel", (nn.Sequential,), {})(model)
    with pytest.raises(CaptureError, match=r"sharded \(FSDP, ZeRO\) .* DistributedDataParallel is"):
        capture_with(sharded, StandIn())
    next(model.parameters()).ds_id = 0  # as ZeRO's third stage leaves it
    with pytest.raises(CaptureError, match="sharded"):
        capture_with(model, StandIn())


def test_a_failed_capture_says_so_and_leaves_the_model_as_it_was() -> None:
    class Failing(StandIn):
        def capture(self, sections: Any, held: int = 0) -> Any:
            raise RuntimeError("operation not permitted\nmore")

    model = adapted()
    captured = capture_with(model, Failing())
    step(model, token_ids())
    step(model, token_ids())
    with pytest.raises(CaptureError, match=r"graphs: operation not permitted\. Train without"):
        step(model, token_ids())
    captured.release()
    step(model, token_ids())


def test_the_handle_is_a_captured() -> None:
    with capture_with(adapted(), StandIn()) as captured:
        assert isinstance(captured, Captured)
