"""The memory plan against measured peaks, the jobs it must fit, and what it says when it cannot."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch

from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.models.layers.fused_norms import fuse_norms
from prodial_kernels.models.layers.recompute import (
    CHECKPOINT,
    KEEP,
    LEVELS,
    NORM,
    OFFLOAD,
    RECOMPUTE,
)
from prodial_kernels.ops import projection
from prodial_kernels.training.memory import activations
from prodial_kernels.training.memory.activations import kept, workspace
from prodial_kernels.training.memory.part_bytes import Tokens
from prodial_kernels.training.memory.peak import Job, peak_of
from prodial_kernels.training.memory.plan import (
    DeviceMemory,
    MemoryPlanError,
    level_plans,
    plan_memory,
    what_would_fit,
)
from prodial_kernels.training.memory.shapes import LayerShape, ModelShape, describe_model
from prodial_kernels.training.sizes import parse_budget, size_text

MIB, GIB = 2**20, 2**30
# transformers' class, width, layers, vocabulary.
SIZES = {
    "mamba-130m": ("Mamba", 768, 24, 50280),
    "mamba-1.4b": ("Mamba", 2048, 48, 50280),
    "mamba-2.8b": ("Mamba", 2560, 64, 50280),
    "falcon-mamba-7b": ("FalconMamba", 4096, 64, 65024),
}


@cache
def shape(name: str) -> ModelShape:
    """A published size with adapters of rank 16 on both projectors; no weight is ever made."""
    import transformers

    prefix, width, depth, vocabulary = SIZES[name]
    config = getattr(transformers, f"{prefix}Config")(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=depth, state_size=16,
        vocab_size=vocabulary, tie_word_embeddings=prefix == "Mamba",
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    apply_prodial(model, ProdialConfig(r=16))
    fuse_norms(model)
    return describe_model(model, kernels=True)


def projector_bytes(model: ModelShape) -> int:
    return sum(part.dense_bytes for part in model.parts if part.kind == "projectors")


def test_counts_what_is_published() -> None:
    model = shape("mamba-1.4b")
    frozen = model.embedding_bytes + model.head_bytes + projector_bytes(model) + model.other_bytes
    assert frozen == 2 * 1_372_178_432
    assert (model.tied, model.trained, model.trained_bytes) == (True, 13_369_344, 4 * 13_369_344)
    layer = model.layers[0]
    assert (layer.mixer, layer.fused, layer.separate_norm) == ("mamba", True, True)
    assert (layer.inner, layer.state, layer.dt_rank, layer.rank) == (4096, 16, 128, 16)
    falcon = shape("falcon-mamba-7b")
    assert not falcon.tied
    assert falcon.head_bytes == falcon.embedding_bytes == 2 * 65024 * 4096
    # Its mixers run on separate kernels: upstream's fused gradient is wrong.
    assert not falcon.layers[0].fused


# MiB, H100, bf16: backbone forward and backward of mamba_ssm's models, r = 16 (README).
MEASURED = [
    ("mamba-130m", 4, 512, 1061),
    ("mamba-130m", 8, 2048, 6117),
    ("mamba-1.4b", 4, 512, 6545),
    ("mamba-1.4b", 4, 2048, 17530),
]


@pytest.mark.parametrize(("name", "batch", "length", "mib"), MEASURED)
def test_agrees_with_measured_peaks(name: str, batch: int, length: int, mib: int) -> None:
    model = shape(name)
    # mamba_ssm's blocks: the norm runs with the addition before it.
    layer = replace(
        model.layers[0], fused_norm=False, separate_norm=False, rounds_input=False,
        two_streams=True,
    )  # fmt: skip
    tokens = Tokens(batch, length, 2)
    predicted = model.embedding_bytes + projector_bytes(model) + model.other_bytes
    # A workspace of cuBLAS for the thread of forward and one for that of backward.
    predicted += model.trained_bytes + 2 * 32 * MIB
    predicted += len(model.layers) * kept(layer, tokens, KEEP) + workspace(layer, tokens, KEEP)
    assert predicted / MIB == pytest.approx(mib, rel=0.02)


@pytest.mark.parametrize(
    ("name", "batch", "quantize", "budget"),
    [
        ("mamba-1.4b", 4, None, "8GB"),
        ("mamba-1.4b", 4, "nf4", "5.5GB"),
        ("mamba-2.8b", 1, "nf4", "6GB"),
        ("falcon-mamba-7b", 1, "nf4", "11GB"),
    ],
)
def test_fits_the_jobs_it_is_for(name: str, batch: int, quantize: str | None, budget: str) -> None:
    job = Job(batch, 2048, quantize=quantize)
    plan = plan_memory(shape(name), job, budget=parse_budget(budget))
    assert plan.fits
    assert plan.total + plan.reserve <= parse_budget(budget)
    assert plan.quantize == quantize
    # No faster plan fits: with one layer less at the last level used, it is over the budget.
    last = max(plan.levels, key=LEVELS.index)
    index = len(plan.levels) - 1 - plan.levels[::-1].index(last)
    eased = list(plan.levels)
    eased[index] = LEVELS[LEVELS.index(last) - 1] if plan.levels[-1] == last else plan.levels[-1]
    if eased[index] == RECOMPUTE and not shape(name).layers[0].fused:
        eased[index] = NORM
    peak = peak_of(shape(name), job, tuple(eased), evaluation_batch=1, library_workspace=32 * MIB)
    reserve = DeviceMemory().fragmentation * peak.total
    assert peak.total + reserve + plan.context > parse_budget(budget)


def test_uses_levels_only_as_far_as_needed() -> None:
    model, job = shape("mamba-1.4b"), Job(4, 2048)
    free = plan_memory(model, job, budget=None)
    assert set(free.levels) == {KEEP}
    assert free.fits
    seen = []
    for gib in (16, 14, 12, 8, 6.5):
        plan = plan_memory(model, job, budget=int(gib * GIB))
        assert plan.fits
        seen.append(plan)
    assert set(seen[0].levels) == {KEEP, NORM}
    assert set(seen[1].levels) == {NORM, RECOMPUTE}
    assert set(seen[3].levels) == {RECOMPUTE, CHECKPOINT}
    for larger, smaller in pairwise(seen):
        assert smaller.total < larger.total
        assert [LEVELS.index(a) for a in smaller.levels] >= [LEVELS.index(a) for a in larger.levels]


def test_every_level_saves_memory() -> None:
    tokens = Tokens(4, 2048, 2)
    for name in ("mamba-1.4b", "falcon-mamba-7b"):
        layer = shape(name).layers[0]
        sizes = [kept(layer, tokens, level) for level in (KEEP, NORM, RECOMPUTE, CHECKPOINT)]
        assert sizes == sorted(sizes, reverse=True)
    # One residual in bf16.
    assert kept(shape("mamba-1.4b").layers[0], tokens, CHECKPOINT) == 2 * 8192 * 2048


@pytest.mark.parametrize("level", ["keep", "recompute", "checkpoint", "offload"])
def test_one_level_for_all_layers(level: str) -> None:
    plan = plan_memory(shape("mamba-130m"), Job(4, 512), budget=None, activations=level)
    assert set(plan.levels) == {level}
    falcon = plan_memory(
        shape("falcon-mamba-7b"), Job(1, 512, quantize="nf4"), budget=None, activations=level
    )
    # It has no in_proj output to compute again.
    assert set(falcon.levels) == {NORM if level == "recompute" else level}


def test_quantises_only_where_levels_are_not_enough() -> None:
    model, job = shape("mamba-1.4b"), Job(4, 2048, quantize="auto")
    assert plan_memory(model, job, budget=8 * GIB).quantize is None
    assert plan_memory(model, job, budget=5 * GIB).quantize is None
    assert plan_memory(model, job, budget=4 * GIB).quantize == "nf4"
    with pytest.raises(ValueError, match="auto"):
        peak_of(model, job, (KEEP,) * 48, evaluation_batch=1, library_workspace=0)


def test_says_what_would_fit() -> None:
    model, job = shape("mamba-1.4b"), Job(4, 2048)
    small = int(2.75 * GIB)
    with pytest.raises(MemoryPlanError, match=r"budget of 2\.75 GiB.*at the least") as caught:
        plan_memory(model, job, budget=small)
    message = str(caught.value)
    assert "quantize 'nf4' and batch_size 3 (2." in message
    assert "GiB" in message
    other = replace(job, quantize="nf4", batch=3)
    assert plan_memory(model, other, budget=small).fits
    assert not plan_memory(model, replace(other, batch=4), budget=small, strict=False).fits
    with pytest.raises(MemoryPlanError, match="What fits: activations 'auto'"):
        plan_memory(model, job, budget=8 * GIB, activations="keep")
    with pytest.raises(MemoryPlanError, match=r"batch_size \d.* with \d times the grad_acc"):
        plan_memory(model, job, budget=int(4.3 * GIB))
    with pytest.raises(MemoryPlanError, match="No change of the options is enough"):
        plan_memory(model, job, budget=GIB)
    least = plan_memory(model, job, budget=None, activations="checkpoint")
    hardly = least.total + least.reserve - 24 * MIB
    assert "optimizer 'adamw8bit'" in what_would_fit(model, job, budget=hardly)
    assert "loss 'chunked'" in what_would_fit(model, replace(job, loss="full"), budget=9 * GIB)


def test_whole_logits_and_full_fine_tuning_cost_what_they_do() -> None:
    model = shape("mamba-130m")
    loss = {
        kind: plan_memory(model, Job(8, 2048, loss=kind), budget=None, activations="checkpoint")
        for kind in ("full", "chunked", "liger")
    }
    assert loss["full"].peak.moment == "when the loss is computed"
    # Three times the logits in fp32.
    assert loss["full"].peak.total > 3 * 4 * 16384 * 50280
    assert loss["chunked"].peak.total < loss["full"].peak.total / 4
    assert loss["liger"].peak.total < loss["full"].peak.total / 4

    everything = replace(
        model, trained=129_135_360, trained_bytes=4 * 129_135_360, embedding_bytes=0,
        parts=(), other_bytes=0, adapted=False,
    )  # fmt: skip
    plan = plan_memory(everything, Job(1, 16, full=True), budget=None)
    # Weights, 16-bit copies, two moments, and their gradients in the end: 18 bytes each.
    assert plan.peak.total == pytest.approx(18 * 129_135_360 + 64 * MIB, rel=0.02)
    eight = plan_memory(everything, Job(1, 16, full=True, optimizer="adamw8bit"), budget=None)
    assert plan.peak.total - eight.peak.total == pytest.approx(6 * 129_135_360, rel=0.02)


def test_evaluates_fewer_sequences_where_that_is_what_does_not_fit() -> None:
    model, job = shape("mamba-130m"), Job(64, 512, loss="chunked")
    wide = plan_memory(model, job, budget=None)
    assert wide.evaluation_batch == 64
    plan = plan_memory(model, job, budget=int(2.2 * GIB), strict=False)
    assert plan.evaluation_batch <= 64
    assert not plan.peak.in_evaluation or plan.evaluation_batch == 1


def test_prints_a_sum_that_adds_up() -> None:
    plan = plan_memory(shape("mamba-1.4b"), Job(4, 2048), budget=8 * GIB)
    assert plan.peak.total == sum(row.bytes for row in plan.peak.rows)
    text = str(plan)
    for part in ("embedding", "and head, tied", "activations", "CUDA context", "memory budget"):
        assert part in text
    assert "NOT ENOUGH" not in text
    assert f"{size_text(plan.total)}" in text
    values = plan.to_dict()
    assert values["allocated"] + values["context"] == plan.total
    assert sum(values["levels"].values()) == 48
    short = plan_memory(shape("mamba-1.4b"), Job(4, 2048), budget=GIB, strict=False)
    assert "NOT ENOUGH" in str(short)


def test_device_constants_count() -> None:
    model, job = shape("mamba-130m"), Job(4, 512)
    small = DeviceMemory(context=0, library_workspace=0, fragmentation=0.0)
    plain = plan_memory(model, job, budget=None, device=small)
    usual = plan_memory(model, job, budget=None)
    assert usual.total - plain.total == DeviceMemory().context + 2 * 32 * MIB
    assert (plain.reserve, usual.reserve > 0) == (0, True)
    graphed = plan_memory(model, replace(job, graph=True), budget=None)
    assert graphed.peak.total > usual.peak.total


def test_counts_what_is_prefetched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert activations.LEAST_PREFETCHED == projection.LEAST_PREFETCHED
    tokens = Tokens(4, 2048, 2)
    large, small = (shape(name).layers[0] for name in ("mamba-1.4b", "mamba-130m"))

    def prefetched(layer: LayerShape, tokens: Tokens) -> int:
        counted = workspace(layer, tokens, KEEP)
        with monkeypatch.context() as patch:
            patch.setattr(activations, "LEAST_PREFETCHED", 2**40)
            return counted - workspace(layer, tokens, KEEP)

    weight = 2 * large.projected * large.width
    assert prefetched(large, tokens) == weight
    recomputed = 2 * tokens.count * large.width
    assert prefetched(replace(large, two_streams=True), tokens) == weight + recomputed
    # A small weight, one in four bits, and one without an adapter are left until their turn.
    assert prefetched(small, tokens) == 0
    assert prefetched(large, replace(tokens, dense_weight=True)) == 0
    assert prefetched(replace(large, rank=0), tokens) == 0


def test_levels_are_tried_from_fast_to_small() -> None:
    plans = list(level_plans(shape("mamba-130m"), "auto"))
    assert set(plans[0]) == {KEEP}
    assert set(plans[-1]) == {OFFLOAD}
    assert len(plans) == 1 + 4 * 24
    tokens = Tokens(4, 512, 2)
    layer = shape("mamba-130m").layers[0]
    sizes = [sum(kept(layer, tokens, level) for level in plan) for plan in plans]
    assert all(first > second for first, second in pairwise(sizes))


def test_only_what_does_not_fit_waits_in_the_hosts_memory() -> None:
    model, job = shape("mamba-130m"), Job(4, 512)
    plans = [
        plan_memory(model, job, budget=budget, activations=OFFLOAD, strict=strict)
        for budget, strict in ((None, True), (10 * GIB, False), (10 * GIB, True))
    ]
    assert [set(plan.levels) for plan in plans] == [{OFFLOAD}, {OFFLOAD}, {KEEP}]
    # Room for a few layers more than at the least.
    budget = plans[0].needed + 40 * MIB
    plan = plan_memory(model, job, budget=budget, activations=OFFLOAD)
    assert plan.fits
    assert set(plan.levels) == {RECOMPUTE, OFFLOAD}
    assert plan.levels[-1] == RECOMPUTE
    # Fewer layers run again than with their checkpoints on the device.
    usual = plan_memory(model, job, budget=budget)
    assert usual.levels.count(CHECKPOINT) + usual.levels.count(OFFLOAD) == 24


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * GIB), ("6GB", 6 * 10**9), ("900 MiB", 900 * MIB), ("1.5gib", 3 * GIB // 2),
     ("5000000", 5_000_000), ("2000000 b", 2_000_000), ("2TB", 2 * 10**12)],
)  # fmt: skip
def test_budgets_are_read(text: str, size: int) -> None:
    assert parse_budget(text) == size


@pytest.mark.parametrize("text", ["", "8 gibi", "-1GB", "0", "GiB", "1e9", "nan", "9" * 400])
def test_other_texts_are_no_budgets(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as '8GiB'"):
        parse_budget(text)


def test_a_size_is_written_as_people_read_it() -> None:
    assert [size_text(n) for n in (3 * GIB, 5 * MIB, 1536)] == ["3.00 GiB", "5 MiB", "1.5 KiB"]


@pytest.mark.parametrize(
    ("option", "value"),
    [("quantize", "int3"), ("optimizer", "sgd"), ("loss", "half"), ("batch", 0)],
)
def test_a_job_checks_its_options(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=option):
        Job(**{"batch": 1, "length": 16, option: value})  # type: ignore[arg-type]


def test_unknown_activations_are_refused() -> None:
    with pytest.raises(ValueError, match="activations must be one of"):
        plan_memory(shape("mamba-130m"), Job(1, 16), budget=None, activations="none")
