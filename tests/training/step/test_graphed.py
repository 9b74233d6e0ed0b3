"""The graphed step on a stand-in that captures by noting the function: shapes, values, refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.training.config import FinetuneConfig
from prodial_kernels.training.data.batches import IGNORED, Batch
from prodial_kernels.training.run.state import Position, load_state, save_state
from prodial_kernels.training.step.choose import ModelFacts, decide, facts_of, make_step
from prodial_kernels.training.step.eager import EagerStep
from prodial_kernels.training.step.graphed import (
    MAX_BUCKETS,
    MOST_PARTS,
    MOST_TOKENS,
    WARM_UP,
    Buckets,
    GraphedStep,
    GraphError,
    Shape,
    buffers,
    choose_graph,
    fill,
)
from prodial_kernels.training.step.loss import ChunkedLoss, LossError, find_head
from prodial_kernels.training.step.optimizers import adapter_parameter_groups
from support.models import build, randomise_adapters

CUDA = torch.device("cuda")


class _Graphs:
    """Replays by running again what was captured, on the same tensors."""

    def __init__(
        self,
        waits: Sequence[str] = (),
        error: Exception | None = None,
        left: Sequence[nn.Parameter] = (),
    ) -> None:
        """``left``: parameters whose gradients a captured function leaves in place."""
        self.left = left
        self.calls: list[str] = []
        self.waits = list(waits)
        self.error = error

    def run(self, function: Callable[[], None]) -> None:
        self.calls.append("run")
        function()

    def run_watched(self, function: Callable[[], None]) -> list[str]:
        self.calls.append("watch")
        function()
        return self.waits

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        self.calls.append("capture")
        if self.error is not None:
            raise self.error

        if self.left:
            function()
        static = [parameter.grad for parameter in self.left]

        def replay() -> None:
            self.calls.append("replay")
            function()
            for tensor, parameter in zip(static, self.left, strict=True):
                assert tensor is not None
                assert parameter.grad is not None
                tensor.copy_(parameter.grad)
                parameter.grad = None

        return replay

    def release(self) -> None:
        self.calls.append("release")


def _model() -> nn.Module:
    model = build("mamba2")
    apply_prodial(model, ProdialConfig(r=2, lora_dropout=0.0))
    randomise_adapters(model)
    return model


def _batch(number: int, n: int = 2, length: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, 48, (n, length), generator=generator)
    labels = ids.clone()
    labels[0, : 2 + number % 3] = IGNORED
    return Batch(ids, labels)


def _optimizer(model: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
    groups = adapter_parameter_groups(model, weight_decay=0.1)
    return torch.optim.AdamW(groups, lr=1e-3, fused=fused)


def _graphed(
    model: nn.Module, graphs: _Graphs, *, fused: bool = True, **options: Any
) -> GraphedStep:
    loss = options.pop("loss", None) or ChunkedLoss(find_head(model), rows=5)
    optimizer = options.pop("optimizer", None) or _optimizer(model, fused)
    return GraphedStep(loss, optimizer, Buckets(2, 16), graphs, clip=0.5, **options)


class _Noting(ChunkedLoss):
    """The chunked loss; it notes the shape of the labels and where the inputs are."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(find_head(model), rows=5)
        self.seen: set[tuple[Any, ...]] = set()

    def __call__(self, input_ids: Any, labels: Any, weight: Any = 1.0, **inputs: Any) -> Any:
        self.seen.add((tuple(labels.shape), input_ids.data_ptr(), labels.data_ptr()))
        return super().__call__(input_ids, labels, weight, **inputs)


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


STEPS: list[list[Batch]] = [
    [_batch(0), _batch(1)],
    [_batch(2), _batch(3)],
    # Another bucket, and an epoch's last batch with a sequence missing.
    [_batch(4, length=7), _batch(5, n=1, length=6)],
    [_batch(6), _batch(7, length=9)],
    [_batch(8, length=16), _batch(9, length=3)],
    [_batch(10, length=5), _batch(11, n=1, length=8)],
]


@pytest.mark.parametrize("fused", [True, False], ids=["captured optimiser", "eager optimiser"])
def test_equals_eager_steps(fused: bool) -> None:
    model = _model()
    other = copy.deepcopy(model)
    left = [] if fused else [p for p in model.parameters() if p.requires_grad]
    graphs = _Graphs(left=left)
    graphed = _graphed(model, graphs, fused=fused)
    eager = EagerStep(ChunkedLoss(find_head(other)), _optimizer(other, fused), clip=0.5)
    for number, parts in enumerate(STEPS):
        lr = 1e-2 / (number + 1)
        results = []
        for step in (graphed, eager):
            step.begin(parts, lr)
            results.append(step.finish())
        assert tuple(results[0]) == pytest.approx(tuple(results[1]), rel=1e-5)
    for name, value in _trained(other).items():
        torch.testing.assert_close(_trained(model)[name], value, rtol=1e-4, atol=1e-6)
    # Steps 3 and 6 are of another shape: graphs go for its first, eager, step and come back.
    assert graphs.calls == [
        "run", "watch", "release", "run", "capture", "replay", "replay", "capture", "replay",
    ]  # fmt: skip
    graphed.close()
    assert graphs.calls[-1] == "release"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inputs_and_learning_rate_stay_where_they_are() -> None:
    model = _model()
    optimizer = _optimizer(model)
    loss = _Noting(model)
    step = _graphed(model, _Graphs(), optimizer=optimizer, loss=loss)
    rates: set[int] = set()
    lrs = []
    for number in range(WARM_UP + 3):
        step.begin([_batch(number)], 0.1 * (number + 1))
        rate = optimizer.param_groups[0]["lr"]
        lrs.append(float(rate))
        rates.add(rate.data_ptr())
        step.finish()
    assert len(rates) == 1
    assert lrs == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert all(group["capturable"] for group in optimizer.param_groups)
    assert [shape for shape, *_ in loss.seen] == [(2, 16)]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_not_finite_is_left_out(poison: float, fused: bool) -> None:
    model = _model()
    optimizer = _optimizer(model, fused)
    left = [] if fused else [p for p in model.parameters() if p.requires_grad]
    step = _graphed(model, _Graphs(left=left), optimizer=optimizer)
    for number in range(WARM_UP + 2):
        step.begin([_batch(number)], 1e-2)
        assert step.finish().finite
    before = _trained(model)
    first = next(p for p in model.parameters() if p.requires_grad)
    moments = {k: v.clone() for k, v in optimizer.state[first].items()}
    handle = model.lm_head.weight.data.clone()
    model.lm_head.weight.data.fill_(poison)
    step.begin([_batch(9)], 1e-2)
    assert not step.finish().finite
    for name, value in _trained(model).items():
        assert torch.equal(value, before[name])
    for kind, value in optimizer.state[first].items():
        assert torch.equal(value, moments[kind]), kind
    model.lm_head.weight.data.copy_(handle)
    step.begin([_batch(9)], 1e-2)
    assert step.finish().finite


def test_a_resumed_run_continues_alike(tmp_path: Any) -> None:
    def run(model: nn.Module, first: int, load: bool) -> list[float]:
        optimizer = _optimizer(model)
        if load:
            load_state(next(tmp_path.glob("step-*")), model, optimizer)
        step = _graphed(model, _Graphs(), optimizer=optimizer)
        losses = []
        for number in range(first, 8):
            step.begin([_batch(number)], 1e-2)
            losses.append(step.finish().loss)
            if number == 3 and not load:
                save_state(tmp_path, Position(step=4), model, optimizer)
        return losses

    model = _model()
    fresh = copy.deepcopy(model)
    whole = run(model, 0, load=False)
    assert run(fresh, 4, load=True) == whole[4:]
    for name, value in _trained(fresh).items():
        assert torch.equal(value, _trained(model)[name])


def test_a_step_that_waits_goes_on_eagerly_and_says_so() -> None:
    said: list[str] = []
    model = _model()
    other = copy.deepcopy(model)
    graphs = _Graphs(waits=["moe.py:12"])
    step = _graphed(model, graphs, say=said.append)
    eager = EagerStep(ChunkedLoss(find_head(other)), _optimizer(other), clip=0.5)
    assert step.captures
    for number in range(5):
        for which in (step, eager):
            which.begin([_batch(number)], 1e-2)
        assert tuple(step.finish()) == pytest.approx(tuple(eager.finish()), rel=1e-5)
    assert said == ["no CUDA graph: the step waits for the device in moe.py:12"]
    assert not step.captures
    assert "capture" not in graphs.calls


def test_a_step_that_waits_is_an_error_where_graphs_are_required() -> None:
    step = _graphed(_model(), _Graphs(waits=["moe.py:12"]), required=True)
    step.begin([_batch(0)], 1e-2)
    step.finish()
    with pytest.raises(GraphError, match=r"waits for the device in moe\.py:12.*'auto' or 'off'"):
        step.begin([_batch(1)], 1e-2)


def test_a_failed_capture_says_what_to_do() -> None:
    step = _graphed(_model(), _Graphs(error=RuntimeError("operation not permitted\nmore")))
    for number in range(WARM_UP):
        step.begin([_batch(number)], 1e-2)
        step.finish()
    with pytest.raises(GraphError, match=r"\(operation not permitted\); use cuda_graph 'off'"):
        step.begin([_batch(9)], 1e-2)


# --- The choice. ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "device", "options", "graphed", "reason"),
    [
        ("auto", CUDA, {}, True, "longer than running"),
        ("auto", torch.device("cpu"), {}, False, "on 'cpu'"),
        ("auto", CUDA, {"tokens": MOST_TOKENS + 1}, False, "8,193 tokens keep the GPU busy"),
        ("auto", CUDA, {"parts": MOST_PARTS + 1}, False, "17 micro-batches"),
        ("auto", CUDA, {"obstacles": ["loss 'liger' waits"]}, False, "'liger' waits"),
        ("on", CUDA, {"tokens": 10**6, "parts": 99}, True, "as asked for"),
        ("off", CUDA, {}, False, "as asked for"),
    ],
)
def test_choice(mode: str, device: Any, options: Any, graphed: bool, reason: str) -> None:
    chosen, why = choose_graph(mode, device=device, **{"tokens": 2048, **options})
    assert chosen is graphed
    assert reason in why


def test_on_needs_what_graphs_need() -> None:
    with pytest.raises(GraphError, match=r"on 'cpu', not on a CUDA device; x\. Use 'auto' or"):
        choose_graph("on", device=torch.device("cpu"), tokens=1, obstacles=["x"])
    with pytest.raises(ValueError, match="'auto', 'on', 'off', got 'yes'"):
        choose_graph("yes", device=CUDA, tokens=1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"loss": "liger"}, "'liger' waits"),
        ({"gradient_checkpointing": True, "lora_dropout": 0.1}, "recomputing dropout"),
    ],
)
def test_what_a_run_asks_for_that_no_graph_can_hold(options: Any, reason: str) -> None:
    facts = ModelFacts(draws_numbers="lora_dropout" in options)
    config = FinetuneConfig(cuda_graph="on", **options).resolved()
    with pytest.raises(GraphError, match=reason):
        decide(config, facts, CUDA)


def test_dropout_is_an_obstacle_only_where_blocks_run_again() -> None:
    config = FinetuneConfig(lora_dropout=0.1).resolved()
    facts = ModelFacts(draws_numbers=True)
    assert decide(config, facts, CUDA).graphed
    assert not decide(config, facts, CUDA, checkpoints=True).graphed


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_facts_of_a_model(dropout: float) -> None:
    model = build("mamba2")
    apply_prodial(model, ProdialConfig(r=2, lora_dropout=dropout))
    assert facts_of(model) == ModelFacts(None, draws_numbers=dropout > 0)
    assert facts_of(model.to("meta")) == ModelFacts(None, draws_numbers=dropout > 0)
    assert not facts_of(nn.Linear(2, 2)).draws_numbers


def test_a_cpu_takes_eager_steps_and_says_what_it_falls_back_to() -> None:
    model, said = _model(), []
    config = FinetuneConfig().resolved()
    device = torch.device("cpu")

    def made() -> Any:
        choice = decide(config, facts_of(model), device)
        optimizer = _optimizer(model)
        return make_step(model, optimizer, config, choice, device=device, say=said.append)

    assert isinstance(made(), EagerStep)
    assert said == []
    model.lm_head.register_forward_hook(lambda module, inputs, output: output)
    made()
    assert "whole in memory" in said[0]


def test_a_head_that_turns_out_otherwise_is_an_error() -> None:
    """A plan has counted with the choice: it is not made again in silence."""
    model = _model()
    config = FinetuneConfig().resolved()
    choice = decide(config, facts_of(model), torch.device("cpu"))
    model.lm_head.register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(LossError, match=r"loss 'chunked' cannot be used.*use loss 'full'"):
        make_step(model, _optimizer(model), config, choice, device=torch.device("cpu"))


# --- Buckets. -------------------------------------------------------------------------------------


def test_lengths_of_buckets() -> None:
    assert Buckets(4, 2048).lengths == [184, 256, 368, 512, 728, 1024, 1456, 2048]
    # Windows keep their length; padded batches are of multiples of 8.
    assert Buckets(4, 100).lengths[-2:] == [100, 104]
    assert len(Buckets(4, 100).lengths) <= MAX_BUCKETS + 1
    assert Buckets(1, 2).lengths == [2, 8]


def test_a_bucket_holds_every_part() -> None:
    buckets = Buckets(3, 64)
    parts = [_batch(0, n=1, length=17), _batch(1, n=2, length=30)]
    assert buckets.shape_of(parts) == Shape(2, 3, 32)
    with pytest.raises(ValueError, match=r"at most \[3, 64\], got one of \[2, 65\]"):
        buckets.shape_of([_batch(0, length=65)])
    with pytest.raises(ValueError, match=r"got one of \[4, 12\]"):
        buckets.shape_of([_batch(0, n=4)])


def test_filling_leaves_nothing_of_the_step_before() -> None:
    held = buffers(Shape(2, 2, 16), _batch(0), "cpu")
    fill([_batch(0, length=16), _batch(1, length=16)], held)
    parts = [_batch(2, n=1, length=5)]
    fill(parts, held)
    ids, labels, *apart = held
    assert apart == [None, None]
    assert torch.equal(ids[0, :1, :5], parts[0].input_ids)
    assert torch.equal(labels[0, :1, :5], parts[0].labels)
    assert int((labels != IGNORED).sum()) == int((parts[0].labels != IGNORED).sum())
    assert int(ids.sum()) == int(parts[0].input_ids.sum())
