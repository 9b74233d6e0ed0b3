"""Training steps on a GPU: the loss without whole logits, and steps captured in CUDA graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.models.layers.head import eval_mode
from prodial_kernels.training.data.batches import IGNORED, Batch
from prodial_kernels.training.run.state import Position, load_state, save_state
from prodial_kernels.training.step.eager import EagerStep, StepResult, TrainingStep
from prodial_kernels.training.step.graphed import Buckets, CudaGraphs, GraphedStep, GraphError
from prodial_kernels.training.step.loss import Loss, make_loss
from prodial_kernels.training.step.optimizers import adapter_parameter_groups, make_optimizer
from support import mamba_ssm_loaded  # noqa: F401
from support.models import build, randomise_adapters

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
_MIXER = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 32, "mamba_chunk_size": 64}
OPTIONS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 64, "state_size": 32, "chunk_size": 64},
    "bamba": _MIXER,
    "falcon_h1": {**_MIXER, "mamba_d_ssm": 512},
    "zamba2": {"n_mamba_heads": 8, "mamba_headdim": 64, "mamba_d_state": 32, "chunk_size": 64},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 64,
        "ssm_state_size": 32,
        "chunk_size": 64,
        "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
    },
}
LENGTH, BATCH, STEPS = 128, 2, 14
# Small enough that a rounding does not grow over the steps.
LR = 3e-4


def adapted(
    name: str = "mamba", *, dropout: float = 0.0, dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """In fp32 the PyTorch implementation and little noise, in bf16 the Triton kernels."""
    model = build(name, hidden_size=256, **OPTIONS[name]).to(dtype)
    apply_prodial(model, ProdialConfig(r=8, lora_dropout=dropout))
    randomise_adapters(model)
    return model.to(DEVICE)


def batch(number: int, length: int = LENGTH) -> Batch:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, 48, (BATCH, length), generator=generator)
    labels = ids.clone()
    labels[0, : number % 5] = IGNORED
    return Batch(ids, labels)


def optimizer_of(model: nn.Module, kind: str = "adamw") -> torch.optim.Optimizer:
    groups = adapter_parameter_groups(model, weight_decay=0.01)
    return make_optimizer(kind, groups, lr=1e-3, device=DEVICE)


def graphed(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> GraphedStep:
    loss: Loss = options.pop("loss", None) or make_loss(model, "chunked")
    options = {"required": True, **options}
    graphs = options.pop("graphs", None) or CudaGraphs(DEVICE)
    return GraphedStep(loss, optimizer, Buckets(BATCH, LENGTH), graphs, clip=1.0, **options)


def eager(model: nn.Module, optimizer: torch.optim.Optimizer) -> EagerStep:
    return EagerStep(make_loss(model, "full"), optimizer, clip=1.0)


def train(
    step: TrainingStep, parts_of: Callable[[int], list[Batch]], first: int = 0, last: int = STEPS,
    *, lr: float = LR,
) -> list[StepResult]:  # fmt: skip
    results = []
    for number in range(first, last):
        step.begin(parts_of(number), lr * (1 + number % 3))
        results.append(step.finish())
    return results


def assert_same_curve(found: list[StepResult], expected: list[StepResult], rel: float) -> None:
    for kind, factor in (("loss", 1), ("grad_norm", 5)):
        ours, theirs = ([getattr(r, kind) for r in results] for results in (found, expected))
        assert ours == pytest.approx(theirs, rel=factor * rel), kind


def loss_over(model: nn.Module, batches: list[Batch]) -> float:
    """Sum of their losses without dropout."""
    loss = make_loss(model, "full")
    with eval_mode(model), torch.no_grad():
        return sum(float(loss(b.input_ids.to(DEVICE), b.labels)) for b in batches)


def recompute_blocks(model: Any) -> None:
    options = {"use_reentrant": False, "preserve_rng_state": False}
    if hasattr(model, "activation_checkpointing_enable"):  # since transformers 5.2x
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)


# --- The loss. ------------------------------------------------------------------------------------


def test_liger_gives_the_same_loss() -> None:
    pytest.importorskip("liger_kernel")
    # In fp32 nothing but the loss differs: liger rounds the gradient of bf16 logits to bf16.
    model = adapted(dtype=torch.float32)
    tokens = batch(3)
    values, gradients = [], []
    for kind in ("full", "liger"):
        model.zero_grad(set_to_none=True)
        value = make_loss(model, kind)(tokens.input_ids.to(DEVICE), tokens.labels, 0.01)
        value.backward()
        values.append(float(value.detach()))
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert gradients[0]
    for found, expected in zip(*reversed(gradients), strict=True):
        assert float((found - expected).norm() / expected.norm()) < 1e-3


# --- Steps in CUDA graphs. ------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_the_curve_is_that_of_eager_steps(family: str, dropout: float) -> None:
    model = adapted(family, dropout=dropout, dtype=torch.float32)
    other = copy.deepcopy(model)
    batches = [batch(number) for number in range(STEPS // 2)]
    before = loss_over(model, batches)
    curves = []
    for m, make in ((model, graphed), (other, eager)):
        torch.manual_seed(1)
        step = make(m, optimizer_of(m))
        curves.append(train(step, lambda number: [batches[number % len(batches)]]))
        step.close()
    assert_same_curve(*curves, rel=1e-3)
    # On the batches it was trained on: single steps differ more by their batch and dropout.
    assert loss_over(model, batches) < 0.99 * before
    for found, expected in zip(model.parameters(), other.parameters(), strict=True):
        if found.requires_grad:
            apart = (found - expected).detach().norm() / expected.detach().norm()
            assert float(apart) < 0.01


class _Launched(CudaGraphs):
    """Launches what it was to capture, operation by operation."""

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        return lambda: self.run(function)


def test_a_replay_draws_and_computes_what_launches_do() -> None:
    """With parameters that stand still.

    Atomic additions in the scan's backward come in any order, and in bf16 this model answers a
    change of its parameters by 1e-5 with a gradient of twice the norm, by whatever code: curves
    of moving parameters part after a few steps, those of two runs of the same launches too.
    """
    model = adapted(dropout=0.1)
    other = copy.deepcopy(model)
    curves = []
    for m, graphs in ((model, CudaGraphs(DEVICE)), (other, _Launched(DEVICE))):
        before = [p.detach().clone() for p in m.parameters()]
        torch.manual_seed(1)
        step = graphed(m, optimizer_of(m), graphs=graphs)
        curves.append(train(step, lambda number: [batch(number % 2)], lr=0.0))
        step.close()
        assert all(torch.equal(p, was) for p, was in zip(m.parameters(), before, strict=True))
    assert_same_curve(*curves, rel=2e-3)
    # The same batch every other step: what differs is the mask, and the forward has no atomics.
    losses = [result.loss for result in curves[0]]
    assert all(a != b for a, b in zip(losses[:-2], losses[2:], strict=True))


@pytest.mark.parametrize("name", ["bamba", "falcon_h1", "zamba2", "nemotron_h"])
def test_hybrids_with_attention_are_captured(name: str) -> None:
    model = adapted(name, dtype=torch.float32)
    other = copy.deepcopy(model)
    curves = []
    for m, make in ((model, graphed), (other, eager)):
        step = make(m, optimizer_of(m))
        curves.append(train(step, lambda number: [batch(number)], 0, 8))
        step.close()
    assert_same_curve(*curves, rel=1e-3)


def test_lengths_in_buckets_and_accumulation() -> None:
    lengths = [128, 100, 40, 128, 90, 41, 64, 128, 33, 100, 60, 128, 40, 97]

    def parts_of(number: int) -> list[Batch]:
        return [batch(2 * number, lengths[number]), batch(2 * number + 1, lengths[-1 - number])]

    model = adapted("mamba2", dtype=torch.float32)
    other = copy.deepcopy(model)
    curves = []
    for m, make in ((model, graphed), (other, eager)):
        step = make(m, optimizer_of(m))
        curves.append(train(step, parts_of))
        step.close()
    assert_same_curve(*curves, rel=1e-3)


def test_recomputed_blocks_can_be_captured() -> None:
    model = adapted(dtype=torch.float32)
    other = copy.deepcopy(model)
    recompute_blocks(model)
    curves = []
    for m, make in ((model, graphed), (other, eager)):
        step = make(m, optimizer_of(m))
        curves.append(train(step, lambda number: [batch(number)]))
        step.close()
    assert_same_curve(*curves, rel=1e-3)


def test_a_step_that_is_not_finite_is_left_out() -> None:
    model = adapted()
    step = graphed(model, optimizer_of(model))
    assert all(result.finite for result in train(step, lambda number: [batch(number)], 0, 6))
    before = [p.detach().clone() for p in model.parameters()]
    norm = model.backbone.norm_f.weight  # type: ignore[union-attr]
    kept = norm.detach().clone()
    with torch.no_grad():
        norm.fill_(float("nan"))  # type: ignore[operator]
    step.begin([batch(6)], 1e-2)
    assert not step.finish().finite
    with torch.no_grad():
        norm.copy_(kept)  # type: ignore[operator]
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
    assert all(result.finite for result in train(step, lambda number: [batch(number)], 7, 9))
    step.close()


def test_a_saved_state_continues_alike(tmp_path: Path) -> None:
    curves = []
    for resumed in (False, True):
        model = adapted(dropout=0.2, dtype=torch.float32)
        optimizer = optimizer_of(model)
        torch.manual_seed(5)
        if resumed:
            load_state(next(tmp_path.glob("step-*")), model, optimizer)
        step = graphed(model, optimizer)
        if not resumed:
            train(step, lambda number: [batch(number)], 0, 7)
            save_state(tmp_path, Position(step=7), model, optimizer)
        curves.append(train(step, lambda number: [batch(number)], 7))
        step.close()
    assert_same_curve(*curves, rel=1e-3)


class _Waiting(nn.Module):
    """A loss that looks at a value on the host."""

    name = "waiting"

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(
        self, input_ids: Tensor, labels: Tensor, weight: Any = 1.0, **options: bool
    ) -> Tensor:
        value = self.loss(input_ids, labels, weight, **options)
        return value if value.item() < 1e9 else value * 0


@pytest.mark.parametrize("required", [True, False])
def test_a_step_that_waits_is_noticed(required: bool) -> None:
    model = adapted(dtype=torch.float32)
    said: list[str] = []
    loss: Any = _Waiting(make_loss(model, "chunked"))
    step = graphed(model, optimizer_of(model), loss=loss, required=required, say=said.append)
    if required:
        with pytest.raises(GraphError, match=f"waits for the device in .*{Path(__file__).name}"):
            train(step, lambda number: [batch(number)])
        return
    other = copy.deepcopy(model)
    found = train(step, lambda number: [batch(number)])
    assert_same_curve(
        found, train(eager(other, optimizer_of(other)), lambda number: [batch(number)]), rel=1e-2
    )
    assert len(said) == 1
    assert "waits for the device" in said[0]


def test_a_new_bucket_does_not_double_the_memory() -> None:
    def peak_of(lengths: list[int]) -> int:
        torch.manual_seed(0)
        model = adapted()
        step = graphed(model, optimizer_of(model))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for number, length in enumerate(lengths):
            step.begin([batch(number, length)], 1e-3)
            step.finish()
        peak = torch.cuda.max_memory_reserved()
        step.close()
        return peak

    alone = peak_of([128] * 6)
    assert peak_of([128] * 4 + [91] * 4 + [128, 91] * 2) < 1.3 * alone + 2**25


@pytest.mark.parametrize("kind", ["adamw8bit", "paged_adamw8bit"])
def test_optimisers_of_bitsandbytes(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    # In bf16 two runs of the same steps differ more than the moments' formats do.
    model = adapted(dtype=torch.float32)
    other = copy.deepcopy(model)
    fresh = copy.deepcopy(model)
    optimizer = optimizer_of(model, kind)
    step = graphed(model, optimizer)
    found = train(step, lambda number: [batch(number)])
    expected = train(eager(other, optimizer_of(other)), lambda number: [batch(number)])
    assert_same_curve(found, expected, rel=5e-2)
    save_state(tmp_path, Position(step=STEPS), model, optimizer)
    restored = optimizer_of(fresh, kind)
    load_state(next(tmp_path.glob("step-*")), fresh, restored)
    curves = [
        train(s, lambda number: [batch(number)], STEPS, STEPS + 5)
        for s in (step, graphed(fresh, restored))
    ]
    assert_same_curve(*curves, rel=5e-3)


def test_a_whole_run_is_graphed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from prodial_kernels.training.config import FinetuneConfig
    from prodial_kernels.training.finetuning import finetune

    results = []
    for mode in ("on", "off"):
        config = FinetuneConfig(
            output=str(tmp_path / mode), max_bytes=200_000, eval_tokens=4096, steps=12,
            eval_every=6, cuda_graph=mode,
        )  # fmt: skip
        results.append(finetune(config))
    assert "in one CUDA graph" in capsys.readouterr().err
    losses = [result.after["loss"] for result in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
