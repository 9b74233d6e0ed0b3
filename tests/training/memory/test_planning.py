"""The plan of a run: from its options to levels, limits and what is printed; CUDA is feigned."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.cli import commands
from prodial_kernels.models.layers.recompute import CHECKPOINT, KEEP, NORM
from prodial_kernels.training import FinetuneConfig, finetune
from prodial_kernels.training.memory import run_plan
from prodial_kernels.training.memory.allocator import grow_segments
from prodial_kernels.training.memory.device import MeasuredMemory, indexed, limited, measure
from prodial_kernels.training.memory.plan import DeviceMemory, MemoryPlanError, plan_memory
from prodial_kernels.training.memory.run_plan import (
    RunPlan,
    block_levels,
    comparison_text,
    plan_run,
)
from prodial_kernels.training.run.directory import RunDirectory
from prodial_kernels.training.step import loss as loss_module
from prodial_kernels.training.step.graphed import GraphError
from support.tiny_model import tiny_mamba2

GIB = 2**30
CUDA = torch.device("cuda")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """An 80 GiB device, of which half is free; kernels are installed."""
    state: dict[str, Any] = {"free": 40 * GIB, "total": 80 * GIB, "fractions": []}
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "mem_get_info", lambda device: (state["free"], state["total"]))
    monkeypatch.setattr(cuda, "memory_reserved", lambda device: GIB)
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda device: 3 * GIB)
    monkeypatch.setattr(cuda, "max_memory_reserved", lambda device: 4 * GIB)
    monkeypatch.setattr(cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "current_device", lambda: 3)

    def set_fraction(fraction: float, device: torch.device) -> None:
        # As the real one does; without an index it raises.
        assert device.index is not None
        state["fractions"].append(fraction)

    monkeypatch.setattr(cuda, "set_per_process_memory_fraction", set_fraction)
    monkeypatch.setattr(run_plan, "kernels_available", lambda: True)
    return state


def config(place: Path, **options: Any) -> FinetuneConfig:
    defaults = {"model": str(place / "model"), "data": str(place / "text.txt")}
    sizes = {"batch_size": 64, "seq_len": 512}
    return FinetuneConfig(**{**defaults, **sizes, **options}).resolved()


def planned(place: Path, **options: Any) -> RunPlan:
    _, plan = plan_run(config(place, **options), CUDA, torch.bfloat16)
    assert plan is not None
    return plan


def test_without_a_budget_what_is_free_is_used(place: Path, device: dict[str, Any]) -> None:
    plan = planned(place)
    # What is free, what PyTorch already holds, and the context that exists.
    assert plan.plan.budget == 41 * GIB + plan.device.context
    assert (plan.limit, plan.allowed) == (None, None)
    assert set(plan.plan.levels) == {KEEP}
    device["free"] = 0
    # Nothing fits; it is tried all the same, as small as it goes.
    assert not planned(place, batch_size=1024).plan.fits


def test_a_budget_chooses_levels(place: Path, device: dict[str, Any]) -> None:
    free = planned(place)
    lean = planned(place, activations="checkpoint").plan
    middle = (free.plan.total + lean.total + lean.reserve) // 2
    plan = planned(place, memory_budget=str(middle))
    assert plan.plan.fits
    assert plan.plan.budget == plan.limit == middle
    assert plan.allowed == middle - plan.device.context
    assert set(plan.plan.levels) != {KEEP}
    assert plan.plan.total < free.plan.total
    with pytest.raises(MemoryPlanError, match="does not fit into the memory budget of 850 MiB"):
        planned(place, memory_budget="850MiB")


def test_a_budget_beyond_the_device_is_what_the_device_has(
    place: Path, device: dict[str, Any]
) -> None:
    plan = planned(place, memory_budget="1TiB")
    assert plan.plan.budget == 41 * GIB + plan.device.context


def test_a_run_is_described_as_it_will_be(place: Path, device: dict[str, Any]) -> None:
    plan = planned(place, r=5, cuda_graph="off", grad_accumulation=2)
    model = tiny_mamba2()
    report = apply_prodial(model, ProdialConfig(r=5))
    assert plan.model.trained == report.trainable
    assert [layer.rank for layer in plan.model.layers] == [5, 5]
    assert (plan.job.batch, plan.job.length, plan.job.itemsize) == (64, 512, 2)
    assert (plan.job.graph, plan.job.accumulates, plan.job.full) == (False, True, False)
    assert plan.job.loss_rows > 512
    assert planned(place, cuda_graph="on").job.graph
    assert planned(place, batch_size=4).job.graph
    assert planned(place, optimizer="adamw8bit", loss="full").job.optimizer == "adamw8bit"
    full = planned(place, method="full")
    assert full.job.full
    assert full.model.trained == sum(p.numel() for p in model.parameters()) - report.trainable
    lora = planned(place, method="lora")
    assert 0.8 < lora.model.trained / planned(place).model.trained < 1.2


@pytest.mark.parametrize(
    ("options", "graphed", "loss"),
    [
        ({}, True, "chunked"),
        # Each of these was planned as a captured step with the chunked loss, and run otherwise.
        ({"lora_dropout": 0.1, "activations": "checkpoint"}, False, "chunked"),
        ({"loss": "liger"}, False, "liger"),
        ({"target_modules": ("in_proj", "out_proj", "lm_head")}, True, "full"),
    ],
)
def test_the_plan_counts_what_the_run_does(
    place: Path, device: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any], graphed: bool, loss: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(loss_module, "find_spec", lambda name: loss == "liger" or None)
    choice, plan = plan_run(config(place, batch_size=2, **options), CUDA, torch.bfloat16)
    assert plan is not None
    assert (choice.graphed, choice.loss) == (plan.job.graph, plan.job.loss) == (graphed, loss)


def test_dropout_that_a_plan_recomputes_is_launched_and_counted_eagerly(
    place: Path, device: dict[str, Any]
) -> None:
    options = {"lora_dropout": 0.1, "batch_size": 2}
    lean = planned(place, activations="checkpoint", **options).plan
    budget = str(lean.total + lean.reserve)
    choice, plan = plan_run(config(place, memory_budget=budget, **options), CUDA, torch.bfloat16)
    assert plan is not None
    assert not choice.graphed
    assert not plan.job.graph
    with pytest.raises(GraphError, match="recomputing dropout"):
        planned(place, memory_budget=budget, cuda_graph="on", **options)


def test_a_divided_model_has_no_plan(place: Path, device: dict[str, Any]) -> None:
    assert plan_run(config(place, shard=True), CUDA, torch.bfloat16)[1] is None
    with pytest.raises(MemoryPlanError, match=r"'8GiB' cannot be kept with shard: .*leave one"):
        plan_run(config(place, shard=True, memory_budget="8GiB"), CUDA, torch.bfloat16)


def test_cannot_keep_a_budget_that_nothing_is_known_about(
    place: Path, device: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MemoryPlanError, match=r"8GiB.*this run is on the CPU"):
        plan_run(config(place, memory_budget="8GiB"), torch.device("cpu"), torch.float32)
    assert plan_run(config(place), torch.device("cpu"), torch.float32)[1] is None
    with monkeypatch.context() as patch:
        patch.setattr(run_plan, "trained_on_meta", lambda *_: torch.nn.Linear(2, 2, device="meta"))
        with pytest.raises(ValueError, match="Linear has no embedding"):
            planned(place, memory_budget="8GiB")
        choice, plan = plan_run(config(place), CUDA, torch.bfloat16)
        assert (choice.loss, plan) == ("full", None)
    monkeypatch.setattr(run_plan, "kernels_available", lambda: False)
    with pytest.raises(MemoryPlanError, match="mamba-ssm and causal-conv1d are not installed"):
        plan_run(config(place, memory_budget="8GiB"), CUDA, torch.bfloat16)
    assert plan_run(config(place), CUDA, torch.bfloat16)[1] is None


def test_advice_is_below_the_plan(place: Path, device: dict[str, Any]) -> None:
    plan = planned(place, activations="keep", batch_size=1024)
    # Of two layers, one is always being computed again.
    deep = replace(plan.model, layers=4 * plan.model.layers)
    kept = plan_memory(deep, plan.job, budget=None, activations="keep", device=plan.device)
    assert "What fits: activations 'auto'" in replace(plan, model=deep, plan=kept).advice()


def test_says_where_gaps_may_be_larger(
    place: Path, device: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    note = "PYTORCH_ALLOC_CONF does not say expandable_segments:True"
    assert note not in str(planned(place)), "nothing was asked to be kept"
    limited_plan = planned(place, memory_budget="8GiB")
    assert note in str(limited_plan)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native, Expandable_Segments:true")
    assert str(limited_plan) == str(limited_plan.plan)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False")
    assert note in str(limited_plan)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"},
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True"},
        ),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"},) * 2,
        (
            {"PYTORCH_ALLOC_CONF": "", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        ) * 2,
    ],
)  # fmt: skip
def test_segments_grow_unless_the_environment_says_otherwise(
    given: dict[str, str], expected: dict[str, str]
) -> None:
    environment = dict(given)
    grow_segments(environment)
    assert environment == expected
    grow_segments(environment)
    assert environment == expected


@pytest.mark.parametrize(("options", "grows"), [(["--memory-budget", "8GiB"], True), ([], False)])
def test_the_command_line_lets_segments_grow_before_pytorch_is_loaded(
    options: list[str], grows: bool, tmp_path: Path
) -> None:
    script = (
        "import sys\n"
        "from prodial_kernels.cli import commands as cli\n"
        "from prodial_kernels.training.memory import allocator\n"
        "class AtPyTorch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            print(allocator.segments_grow())\n"
        "            raise SystemExit\n"
        "sys.meta_path.insert(0, AtPyTorch())\n"
        "cli.main(sys.argv[1:])\n"
    )
    arguments = ["finetune", "--device", "cpu", "--model", str(tmp_path / "none"), *options]
    clean = {k: v for k, v in os.environ.items() if "ALLOC_CONF" not in k}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments, "--output", str(tmp_path / "run")],
        capture_output=True, text=True, env=clean, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(grows)]


def test_measured_beside_predicted(place: Path, device: dict[str, Any]) -> None:
    plan = planned(place)
    measured = measure(CUDA)
    assert measured == MeasuredMemory(3 * GIB, 4 * GIB, 39 * GIB)
    memory = plan.compared(measured)
    assert memory["ratio"] == 3 * GIB / plan.plan.peak.total
    assert memory["measured"] == {"allocated": 3 * GIB, "reserved": 4 * GIB, "outside": 39 * GIB}
    text = comparison_text(memory)
    assert text.startswith("3.00 GiB of tensors, predicted ")
    assert "4.00 GiB reserved, 39.00 GiB outside PyTorch (allowed for: 832 MiB)" in text


def test_the_limit_is_taken_back(device: dict[str, Any]) -> None:
    with limited(CUDA, None):
        pass
    assert device["fractions"] == []
    with pytest.raises(KeyError), limited(CUDA, 8 * GIB):
        raise KeyError
    assert device["fractions"] == [0.1, 1.0]
    with limited(CUDA, 800 * GIB):
        pass
    assert device["fractions"][2:] == [1.0, 1.0]


def test_a_device_gets_the_index_of_the_current_one(device: dict[str, Any]) -> None:
    assert [indexed(d).index for d in (CUDA, torch.device("cuda", 1))] == [3, 1]


def test_levels_without_a_plan() -> None:
    model = tiny_mamba2()
    apply_prodial(model, ProdialConfig(r=2))
    assert block_levels(model, "auto") is block_levels(model, "keep") is None
    assert block_levels(model, "recompute") == (NORM, NORM)
    assert block_levels(model, "checkpoint") == (CHECKPOINT, CHECKPOINT)


def test_a_planned_run_prints_and_reports(
    place: Path, tmp_path: Path, device: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The whole way with a plan, on the CPU: what a plan decides is done and reported."""
    from prodial_kernels.training import finetuning

    def plan(config: FinetuneConfig, where: torch.device, dtype: torch.dtype, *_: Any) -> Any:
        return plan_run(replace(config, cuda_graph="off"), CUDA, dtype)

    monkeypatch.setattr(finetuning, "plan_run", plan)
    monkeypatch.setattr(finetuning, "measure", lambda where: MeasuredMemory(GIB, GIB, 0))
    options = {"batch_size": 2, "seq_len": 32, "steps": 2, "eval_tokens": 64}
    run = config(
        place, output=str(tmp_path / "run"), device="cpu", activations="recompute",
        memory_budget="8GiB", **options,
    )  # fmt: skip
    result = finetune(run)
    assert result.memory is not None
    assert result.memory["plan"]["levels"] == {NORM: 2}
    assert result.memory["measured"]["allocated"] == GIB
    assert "measured / predicted" in str(result)
    printed = capsys.readouterr().err
    assert "memory plan: all 2 layers compute the norm before in_proj again" in printed
    assert "peak memory: 1.00 GiB of tensors, predicted" in printed
    # 8 GiB less the context, of 80.
    expected = (8 * GIB - DeviceMemory().context) / (80 * GIB)
    assert device["fractions"] == [pytest.approx(expected), 1.0]


def test_quantises_only_where_nothing_else_fits(
    place: Path, tmp_path: Path, device: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prodial_kernels.training import finetuning

    dense = planned(place, quantize="auto")
    assert dense.plan.quantize is None
    smallest = plan_memory(
        dense.model, replace(dense.job, quantize=None), budget=0, device=dense.device, strict=False
    )
    budget = smallest.total + smallest.reserve - 1
    plan = planned(place, quantize="auto", memory_budget=str(budget))
    assert plan.plan.quantize == "nf4"

    # A run does what the plan chose, and goes on with it without choosing again.
    options = {"quantize": "nf4", "cuda_graph": "off"}
    choice, chosen_plan = plan_run(config(place, **options), CUDA, torch.bfloat16)
    chosen = iter([(choice, chosen_plan), (choice, None)])

    def choose(config: FinetuneConfig, where: torch.device, dtype: torch.dtype, *_: Any) -> Any:
        return next(chosen)

    monkeypatch.setattr(finetuning, "plan_run", choose)
    monkeypatch.setattr(finetuning, "measure", lambda where: MeasuredMemory(GIB, GIB, 0))
    options = {"batch_size": 2, "seq_len": 32, "steps": 1, "eval_tokens": 64, "device": "cpu"}
    automatic = config(place, output=str(tmp_path / "run"), quantize="auto", **options)
    finetune(automatic, progress=False)
    saved = RunDirectory(tmp_path / "run").read_identity()
    assert saved.config["quantize"] == "nf4"
    finetune(automatic, resume=True, progress=False)


def test_the_written_model_is_checked_by_blocks_where_it_does_not_fit(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prodial_kernels.training import finetuning, merging

    monkeypatch.setattr(finetuning, "has_room_dense", lambda *_: False)
    visited = []
    by_blocks = merging.blocks_on_demand

    def noting(model: Any, where: torch.device) -> Any:
        visited.append(where)
        return by_blocks(model, where)

    monkeypatch.setattr(merging, "blocks_on_demand", noting)
    options = {"batch_size": 1, "seq_len": 32, "steps": 1, "eval_tokens": 64, "device": "cpu"}
    run = config(place, output=str(tmp_path / "run"), quantize="nf4", **options)
    result = finetune(run, progress=False)
    assert visited == [torch.device("cpu")]
    assert result.agreement.relative <= result.agreement.relative_tolerance


def test_help_names_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        commands.main(["finetune", "--help"])
    text = capsys.readouterr().out
    assert "--memory-budget SIZE" in text
    assert "--activations {auto,keep,recompute,checkpoint,offload}" in text
