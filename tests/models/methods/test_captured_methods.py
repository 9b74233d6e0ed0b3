"""Methods under torch.compile and in captured blocks: as without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import (
    AdditionalScan,
    Lora,
    ParallelAdapter,
    PartialLora,
    PartialTuning,
    adapter_disabled,
    apply_methods,
)
from prodial_kernels.captured import CaptureWarning
from support.captured.steps import gradients, release, same, step, warmed
from support.mixers import cuda_stand_ins
from support.mixers.method_oracle import move
from support.models import build, token_ids

METHODS: list[Any] = [
    Lora(("in_proj", "x_proj"), r=2), PartialLora(("Z", "C"), r=2), AdditionalScan(2),
    PartialTuning(("A_log", "conv1d")), ParallelAdapter(r=2),
]  # fmt: skip


def moved(methods: list[Any]) -> nn.Module:
    model = build("mamba")
    apply_methods(model, methods)
    move(model)
    return model


def test_captured_blocks_train_methods() -> None:
    model = moved(METHODS)
    plain = copy.deepcopy(model)
    engine = warmed(model)
    for seed in (1, 7):
        ids = token_ids(seed=seed)
        assert torch.equal(step(model, ids), step(plain, ids))
        same(gradients(model), gradients(plain))
    assert engine.captures == 1
    release(model)


def test_a_captured_model_sees_that_methods_are_switched_off() -> None:
    """Also where no layer has an adapter that could be switched off."""
    model = moved([PartialTuning(("A_log", "D"))])
    # So that blocks run for training, and are replayed, with nothing of theirs trained.
    model.get_input_embeddings().requires_grad_(True)
    plain = copy.deepcopy(model)
    warmed(model)
    assert torch.equal(step(model, token_ids()), step(plain, token_ids()))
    with adapter_disabled(model), adapter_disabled(plain), pytest.warns(CaptureWarning):
        assert torch.equal(step(model, token_ids()), step(plain, token_ids()))
    release(model)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("kernels", [False, True], ids=["separate", "block"])
def test_compiled_in_one_graph(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels:
        cuda_stand_ins.install(monkeypatch)
    model = moved(METHODS)
    ids = token_ids()

    def results(function: Any) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        loss = function(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **named}

    expected = results(model)
    torch._dynamo.reset()
    found = results(torch.compile(model, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(found, expected)
    assert len(found) == 1 + sum(p.requires_grad for p in model.parameters())
