"""The loop against a plain one, its schedule, and what it does when a loss is not finite."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from prodial_kernels.training.data.batches import IGNORED, Batch
from prodial_kernels.training.run.loop import (
    LoopOptions,
    NonFiniteLossError,
    StepRecord,
    cut_warm_up,
    learning_rate,
    train,
)
from prodial_kernels.training.run.signals import Interrupted, StopSignals
from prodial_kernels.training.run.state import Position
from prodial_kernels.training.step.eager import EagerStep
from prodial_kernels.training.step.loss import FullLoss


class _Output:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


class _Model(nn.Module):
    """An embedding and a linear layer: a causal language model in shape."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6).requires_grad_(False)
        self.head = nn.Linear(6, 11)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> _Output:
        assert not use_cache
        return _Output(self.head(self.embedding(input_ids)))


class _Batches:
    """Random batches by number; each has another number of labels."""

    steps_per_epoch, n_tokens, fingerprint = 5, 100, "x"

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 11, (2, 8), generator=generator)
        labels = ids.clone()
        labels[0, : 2 + step % 4] = IGNORED
        return Batch(ids, labels)


class _Events:
    def __init__(self, *, stop_after: int | None = None, stop_in: str = "logged") -> None:
        self.stopped = False
        self._stop = (stop_in, stop_after)
        self.calls: list[tuple[str, int]] = []
        self.records: list[StepRecord] = []

    def logged(self, record: StepRecord) -> None:
        self.records.append(record)
        self.calls.append(("logged", record.position.step))
        self.stopped |= self._stop == self.calls[-1]

    def save(self, position: Position) -> None:
        self.calls.append(("save", position.step))

    def evaluate(self, position: Position) -> None:
        self.calls.append(("evaluate", position.step))
        self.stopped |= self._stop == self.calls[-1]

    def of(self, kind: str) -> list[int]:
        return [step for what, step in self.calls if what == kind]


def _train(model: nn.Module, events: Any, **options: Any) -> Position:
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], weight_decay=0.1
    )
    step = EagerStep(FullLoss(model), optimizer, clip=options.pop("clip", 1.0))
    loop_options = LoopOptions(**{"steps": 6, "lr": 0.05, "warmup": 2, **options})
    with StopSignals() as signals:
        return train(model, step, _Batches(), loop_options, events, signals=signals)


def test_equals_a_plain_loop() -> None:
    model = _Model()
    plain = copy.deepcopy(model)
    events = _Events()
    end = _train(model, events, grad_accumulation=3, clip=0.5)

    optimizer = torch.optim.AdamW(plain.head.parameters(), weight_decay=0.1)
    losses, norms = [], []
    for step in range(6):
        ids, labels = (
            torch.cat(x)
            for x in zip(*(_Batches().batch(3 * step + i)[:2] for i in range(3)), strict=True)
        )
        loss = functional.cross_entropy(
            plain(ids, use_cache=False).logits[:, :-1].flatten(0, 1),
            labels[:, 1:].flatten(),
            ignore_index=IGNORED,
        )
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(plain.head.parameters(), 0.5)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(LoopOptions(steps=6, lr=0.05, warmup=2), step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    assert [r.loss for r in events.records] == pytest.approx(losses, rel=1e-5)
    assert [r.grad_norm for r in events.records] == pytest.approx(norms, rel=1e-5)
    torch.testing.assert_close(model.head.weight, plain.head.weight, rtol=1e-4, atol=1e-6)
    assert (end.step, end.micro_batches, end.tokens) == (6, 18, 18 * 16)
    assert losses[-1] < losses[0]


def test_frozen_parameters_stay_and_do_not_count_for_the_norm() -> None:
    model = _Model()
    before = model.embedding.weight.clone()
    _train(model, _Events())
    assert torch.equal(model.embedding.weight, before)
    assert model.embedding.weight.grad is None


def test_order_of_logging_saving_and_evaluating() -> None:
    events = _Events()
    _train(_Model(), events, steps=5, eval_every=2, save_every=3)
    assert events.calls == [
        ("evaluate", 0), ("logged", 1),
        ("logged", 2), ("evaluate", 2),
        ("logged", 3), ("save", 3),
        ("logged", 4), ("evaluate", 4),
        ("logged", 5), ("save", 5), ("evaluate", 5),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("where", "after", "end"),
    [
        # Where nothing is due, where a save is, and after an evaluation with and without a save.
        ("logged", 1, [("logged", 1), ("save", 1), ("evaluate", 1)]),
        ("logged", 3, [("logged", 3), ("save", 3), ("evaluate", 3)]),
        ("evaluate", 2, [("logged", 2), ("evaluate", 2), ("save", 2)]),
        ("evaluate", 0, [("evaluate", 0)]),
        ("evaluate", 6, [("logged", 6), ("save", 6), ("evaluate", 6)]),
    ],
)
def test_a_run_that_is_stopped_is_saved_and_evaluated_once(
    where: str, after: int, end: list[tuple[str, int]]
) -> None:
    events = _Events(stop_after=after, stop_in=where)
    position = _train(_Model(), events, steps=9, eval_every=2, save_every=3)
    assert position.step == after
    assert events.calls[-len(end) :] == end
    assert len({*events.calls}) == len(events.calls)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5)]),
    ],
)
def test_schedules(schedule: str, expected: list[float]) -> None:
    options = LoopOptions(steps=6, lr=1.0, schedule=schedule, warmup=2)
    assert [learning_rate(options, step) for step in range(6)] == pytest.approx(expected)


def test_a_run_that_ends_within_its_warm_up_says_so() -> None:
    assert cut_warm_up(LoopOptions(steps=10, lr=1.0, warmup=10)) is None
    told = cut_warm_up(LoopOptions(steps=2, lr=3e-3, warmup=10))
    assert told == (
        "the warm-up of 10 steps is longer than the run of 2: the learning rate reaches 0.0006 of "
        "0.003"
    )


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_the_step(poison: str) -> None:
    model = _Model()
    events = _Events()
    seen: list[torch.Tensor] = []

    def spoil(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        seen.append(model.head.weight.detach().clone())
        if len(seen) < 4:
            return output
        if poison == "loss":
            return output * math.nan
        output.register_hook(lambda gradient: gradient * math.inf)
        return output

    model.head.register_forward_hook(spoil)
    with pytest.raises(NonFiniteLossError, match=r"at step 4 .*lower learning rate such as 0\.003"):
        _train(model, events)
    assert torch.equal(model.head.weight, seen[-1])
    assert events.of("logged") == [1, 2, 3]


def test_a_signal_in_a_step_finishes_and_saves_it() -> None:
    import os
    import signal

    class Stopping(_Events):
        def logged(self, record: StepRecord) -> None:
            super().logged(record)
            if record.position.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    events = Stopping()
    with pytest.raises(Interrupted) as caught:
        _train(_Model(), events)
    assert caught.value.exit_code == 143
    assert events.calls[-2:] == [("logged", 3), ("save", 3)]


def test_a_signal_in_an_evaluation_saves_the_step_before_it() -> None:
    import os
    import signal

    class Stopping(_Events):
        def evaluate(self, position: Position) -> None:
            super().evaluate(position)
            if position.step == 2:
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(1000):
                    pass

    events = Stopping()
    with pytest.raises(Interrupted) as caught:
        _train(_Model(), events, eval_every=2)
    assert caught.value.exit_code == 130
    assert events.calls[-2:] == [("evaluate", 2), ("save", 2)]
