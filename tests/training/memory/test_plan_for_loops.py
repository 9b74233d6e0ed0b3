"""``plan()``: the command line's memory plan for anybody's loop, and applying it in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import prodial_kernels
from prodial_kernels import (
    AffixTuning,
    ProdialConfig,
    ProdialLinear,
    PromptTuning,
    apply_prodial,
    quantize_model,
)
from prodial_kernels.models.layers.recompute import CHECKPOINT, KEEP
from prodial_kernels.training import FinetuneConfig
from prodial_kernels.training.memory import for_model, run_plan
from prodial_kernels.training.memory.for_model import TrainingPlan
from prodial_kernels.training.memory.plan import MemoryPlanError
from prodial_kernels.training.memory.run_plan import plan_run
from prodial_kernels.training.step.loss import LossError
from support.tiny_model import tiny_mamba2

GIB = 2**30
SIZES: dict[str, Any] = {"batch_size": 64, "seq_len": 512}


def plan(model: Any, **options: Any) -> TrainingPlan:
    return prodial_kernels.plan(model, **{**SIZES, **options})


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An 80 GiB device, of which half is free; kernels are installed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GIB)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for module in (for_model, run_plan):
        monkeypatch.setattr(module, "kernels_available", lambda: True)


def test_it_is_the_command_lines_plan(place: Path, gpu: None) -> None:
    """Eager steps, the chunked loss; but for an evaluation, which in a trainer has whole logits."""
    path = str(place / "model")
    for budget in ("8GB", "2500MiB"):
        config = FinetuneConfig(
            model=path, data=path, memory_budget=budget, cuda_graph="off", loss="chunked", **SIZES
        ).resolved()
        _, run = plan_run(config, torch.device("cuda"), torch.bfloat16)
        assert run is not None
        here = plan(path, budget=budget)
        assert here.levels == run.plan.levels
        if not here.plan.peak.in_evaluation:
            assert here.plan.peak == run.plan.peak
        assert here.plan.to_dict()["context"] == run.plan.context
        assert str(here).splitlines()[0] == str(run.plan).splitlines()[0]
        assert (here.fits, here.total <= 8 * GIB) == (True, True)


def test_names_configurations_and_models_give_one_plan(place: Path) -> None:
    model = tiny_mamba2().bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = tiny_mamba2().bfloat16()
    apply_prodial(adapted, ProdialConfig())
    plans = [
        plan(place / "model" and str(place / "model")), plan(model.config), plan(model),
        plan(adapted),
    ]  # fmt: skip
    assert len({str(each) for each in plans}) == 1
    # It is only looked at.
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert not [m for m in model.modules() if isinstance(m, ProdialLinear)]
    wide = plan(model, adapter=ProdialConfig(r=30))
    assert wide.total > plans[0].total
    assert wide.levels == (KEEP, KEEP)
    assert "there is none here" in str(wide)
    quantize_model(model, "int8")
    packed, dense = (each.plan.to_dict()["rows"] for each in (plan(model), plans[0]))
    sizes = [
        sum(row["bytes"] for row in rows if "frozen" in row["what"]) for rows in (packed, dense)
    ]
    assert sizes[0] < sizes[1]


def test_tokens_of_methods_take_what_a_longer_text_takes() -> None:
    model, k = tiny_mamba2().bfloat16(), 64
    alone = plan(model, adapter=ProdialConfig.of([PromptTuning(1)]))
    longer = plan(model, adapter=ProdialConfig.of([PromptTuning(1 + k)]))
    text = plan(model, adapter=ProdialConfig.of([PromptTuning(1)]), seq_len=SIZES["seq_len"] + k)
    more = longer.total - alone.total
    # But for what trains.
    assert more == pytest.approx(text.total - alone.total, rel=0.01)
    assert more > 64 * k * 1000
    affix = plan(model, adapter=ProdialConfig.of([AffixTuning(1 + k)]))
    assert affix.total > plan(model, adapter=ProdialConfig.of([AffixTuning(1)])).total


def test_a_smaller_budget_gives_smaller_levels_and_evaluations(place: Path) -> None:
    model = str(place / "model")
    free = plan(model)
    assert free.plan.budget is None
    assert (free.fits, free.evaluation_batch) == (True, 64)
    least = plan(model, activations="checkpoint", budget="2GiB")
    tight = plan(model, budget=least.total + 2**20)
    assert CHECKPOINT in tight.levels
    assert tight.total < free.total
    with pytest.raises(MemoryPlanError, match="does not fit into the memory budget of 900 MiB"):
        plan(model, budget="900MiB")
    # Whole logits of an evaluation are what does not fit then: fewer sequences at once do.
    config = tiny_mamba2().config
    config.vocab_size = 50_000
    few = plan(config, budget="4GiB")
    assert 1 <= few.evaluation_batch < 64
    assert f"evaluate at most {few.evaluation_batch} sequences at once" in str(few)


def test_applied_it_changes_nothing_that_is_computed() -> None:
    model: Any = tiny_mamba2().train()
    apply_prodial(model, ProdialConfig(r=2))
    ids = torch.randint(0, 257, (2, 24))

    def step() -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    own, kind = step(), type(model)
    made = prodial_kernels.plan(model, batch_size=2, seq_len=24, activations="checkpoint")
    assert made.levels == (CHECKPOINT, CHECKPOINT)
    with made.apply(model):
        assert model(input_ids=ids, labels=ids, use_cache=False).logits is None
        assert type(model.backbone.layers[0]) is not type(tiny_mamba2().backbone.layers[0])
        torch.testing.assert_close(step(), own, rtol=1e-4, atol=1e-6)
    assert type(model) is kind
    assert type(model.backbone.layers[0]) is type(tiny_mamba2().backbone.layers[0])
    assert torch.equal(step()[0], own[0])
    with prodial_kernels.plan(model, batch_size=2, seq_len=24, loss="full").apply(model):
        assert model(input_ids=ids, labels=ids, use_cache=False).logits is not None


def test_what_cannot_be_planned_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_mamba2()
    with pytest.raises(ValueError, match="batch must be at least 1"):
        plan(model, batch_size=0)
    with pytest.raises(ValueError, match="activations must be one of"):
        plan(model, activations="less")
    adapted = tiny_mamba2()
    apply_prodial(adapted, ProdialConfig(r=2))
    with pytest.raises(ValueError, match="this one has an adapter"):
        plan(adapted, adapter=ProdialConfig(r=2))
    made = plan(adapted)
    deeper = replace(made, plan=replace(made.plan, levels=(KEEP,) * 3))
    with pytest.raises(ValueError, match="2 blocks, got 3 levels"):
        deeper.apply(adapted)
    with monkeypatch.context() as patch:
        patch.setattr(for_model, "head_obstacle", lambda model: "it caps its logits")
        with pytest.raises(LossError, match="loss 'chunked' cannot be planned: it caps its logits"):
            plan(model, loss="chunked")
        assert plan(model).job.loss == "full"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(MemoryPlanError, match="mamba-ssm and causal-conv1d are not installed"):
        plan(model)


def test_adapters_of_others_are_not_counted_as_ours() -> None:
    peft = pytest.importorskip("peft")
    from prodial_kernels.peft import ProdialPeftConfig

    lora = peft.get_peft_model(tiny_mamba2(), peft.LoraConfig(target_modules=["in_proj"]))
    with pytest.raises(ValueError, match="adapters of PEFT and none of ProDiaL"):
        plan(lora)
    plain = tiny_mamba2()
    apply_prodial(plain, ProdialConfig(r=4))
    wrapped: nn.Module = peft.get_peft_model(tiny_mamba2(), ProdialPeftConfig(r=4))
    assert plan(wrapped).total == plan(plain).total
    plan(wrapped).apply(wrapped).remove()
