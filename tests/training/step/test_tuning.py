"""Upstream's kernels tune before a run: on what, within which memory, and leaving no trace."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch

from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.training.memory.peak import Job, tuning_of
from prodial_kernels.training.memory.plan import MemoryPlanError, plan_memory
from prodial_kernels.training.memory.shapes import describe_model
from prodial_kernels.training.step.tuning import LEAST_TOKENS, TIMING_BYTES, is_tuned, tune
from support.models import build

WORKSPACE = 32 * 2**20


def adapted(name: str) -> torch.nn.Module:
    model = build(name)
    apply_prodial(model, ProdialConfig(r=4))
    return model.train()


@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_h1", "nemotron_h"])
def test_mixers_run_and_nothing_changes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(name)
    called: list[tuple[bool, torch.Size]] = []
    for module in model.modules():
        if "A_log" in module._parameters:
            module.register_forward_pre_hook(
                lambda module, args: called.append((module.training, args[0].shape))
            )
    state = torch.get_rng_state()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert tune(model, 16) >= 0
    # Of mixers that are alike one; Mamba-1's kernels choose nothing.
    width = model.get_input_embeddings().weight.shape[1]
    expected = [] if name == "mamba" else [(False, (1, 16, width)), (True, (1, 16, width))]
    assert called == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    for key, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[key])


def test_whether_there_is_something_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    assert is_tuned()

    def kernel(n):
        pass

    for number in (1, 2):
        configs = [triton.Config({}, num_warps=4) for _ in range(number)]
        module = types.ModuleType("mamba_ssm.ops.kernels")
        module.kernel = triton.autotune(configs=configs, key=["n"])(triton.jit(kernel))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        assert is_tuned() is (number == 1)


def test_the_plan_has_room_for_it() -> None:
    shape = describe_model(adapted("mamba2"), kernels=True)
    job = Job(1, 2048, tunes=True)
    assert tuning_of(shape, replace(job, tunes=False), 0, library_workspace=WORKSPACE) == (0, 0)
    mamba1 = describe_model(adapted("mamba"), kernels=True)
    assert tuning_of(mamba1, job, 0, library_workspace=WORKSPACE) == (0, 0)
    tokens, size = tuning_of(shape, job, 2**40, library_workspace=WORKSPACE)
    assert tokens == 2048
    least, less = tuning_of(shape, job, 0, library_workspace=WORKSPACE)
    assert least == LEAST_TOKENS
    assert TIMING_BYTES < less < size
    # The most that stays below the run's own peak.
    assert tuning_of(shape, job, size - 1, library_workspace=WORKSPACE)[0] == 1024
    plan = plan_memory(shape, job, budget=None, activations="checkpoint")
    assert plan.tuning > plan.peak.total
    assert plan.needed == plan.tuning + plan.context
    assert "while upstream's kernels tune" in str(plan)
    assert plan_memory(shape, job, budget=plan.needed, activations="checkpoint").fits
    with pytest.raises(MemoryPlanError, match="at the least"):
        plan_memory(shape, job, budget=plan.needed - 1, activations="checkpoint")
