"""A loss whose finiteness is answered by a copy on the host."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels.captured.answers import early
from prodial_kernels.captured.answers.early import EarlyLoss, early_losses
from support.captured.models import adapted
from support.models import token_ids


def loss_of(value: float) -> tuple[Tensor, Tensor]:
    x = torch.tensor(value, requires_grad=True)
    return x, x * 2


@pytest.mark.parametrize("value", [1.5, math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("scale", [3, 0.5, 0.0, math.inf])
def test_answers_are_those_of_the_loss(value: float, scale: float) -> None:
    _, plain = loss_of(value)
    given = EarlyLoss.of(plain)
    for do in (
        lambda one: one, lambda one: one.detach(), lambda one: one * scale,
        lambda one: scale * one, lambda one: one / (scale or 1), lambda one: (one * 2).detach() / 4,
    ):  # fmt: skip
        found, expected = do(given), do(plain)
        assert type(found) is EarlyLoss
        for question in (torch.isnan, torch.isinf, Tensor.isnan, Tensor.isinf):
            assert bool(question(found)) == bool(question(expected))


def test_changes_in_place_are_followed_or_seen() -> None:
    _, plain = loss_of(1.0)
    given = EarlyLoss.of(plain)
    given *= 2
    assert type(given) is EarlyLoss
    assert given._copy.later
    given *= math.inf
    assert torch.isinf(given)
    assert not torch.isnan(given)
    detached = EarlyLoss.of(loss_of(1.0)[1]).detach()
    # Not by a number: the copy knows nothing of it, so the loss is asked.
    detached.add_(torch.tensor(math.nan))
    assert torch.isnan(detached)


def test_the_copy_answers() -> None:
    given = EarlyLoss.of(loss_of(1.0)[1]).detach()
    given._copy.tensor.fill_(math.nan)
    assert torch.isnan(given)
    assert float(given) == 2.0


def test_gradients_and_results_are_plain() -> None:
    x, plain = loss_of(3.0)
    given = EarlyLoss.of(plain)
    given *= 2
    (given / 4).backward()
    assert type(x.grad) is Tensor
    assert float(x.grad) == 1.0
    total = torch.zeros(())
    total += given.detach()
    assert type(total) is Tensor
    assert float(total) == 12.0
    assert type(given + 1) is Tensor
    assert type(given * torch.ones(())) is Tensor
    assert given.item() == 12.0
    assert given.device == torch.device("cpu")


class Losses(nn.Module):
    def forward(self, output: Any) -> Any:
        return output


def test_what_is_made_early() -> None:
    model = Losses()
    handle = early_losses(model)
    _, loss = loss_of(1.0)
    assert type(model({"loss": loss})["loss"]) is EarlyLoss
    for other in (loss[None], loss.detach(), None):
        assert type(model({"loss": other})["loss"]) is not EarlyLoss
    assert model((loss,))[0] is loss
    with torch.no_grad():
        assert model({"loss": loss})["loss"] is loss
    assert model.eval()({"loss": loss})["loss"] is loss
    handle.remove()
    assert model.train()({"loss": loss})["loss"] is loss


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_trainer_leaves_out_the_same_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    asked: list[bool] = []
    value = early._Copy.value
    monkeypatch.setattr(early._Copy, "value", lambda one: asked.append(True) or value(one))
    torch.manual_seed(0)
    start = adapted()
    ids = token_ids(batch=12)

    class Poisoned(TrainerCallback):
        """The third step's loss is NaN."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.weight = kwargs["model"].backbone.norm_f.weight
            if state.global_step == 2:
                self.weight.data[0] = math.nan

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            if state.global_step == 2:
                self.weight.data[0] = 1.0
                for parameter in kw["model"].parameters():
                    parameter.grad = None

    def losses(*, is_early: bool) -> list[float]:
        model = copy.deepcopy(start)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(tmp_path), per_device_train_batch_size=1, max_steps=6, use_cpu=True,
                gradient_accumulation_steps=2, report_to=[], logging_steps=1, disable_tqdm=True,
                save_strategy="no",
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in ids],
            callbacks=[Poisoned()],
        )  # fmt: skip
        if is_early:
            early_losses(model)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    expected = losses(is_early=False)
    assert not asked
    assert losses(is_early=True) == expected
    assert all(map(math.isfinite, expected))
    # isnan, and isinf of what is not NaN.
    assert len(asked) >= 12
