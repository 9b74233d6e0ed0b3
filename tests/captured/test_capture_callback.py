"""Captured blocks in transformers' Trainer, with graphs that a CPU stands in for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import DataLoaderShard
from torch import nn

from prodial_kernels.captured import CaptureError
from prodial_kernels.captured import callback as callbacks
from prodial_kernels.captured.callback import CaptureCallback
from prodial_kernels.captured.checkpointing import checkpoints_outside
from prodial_kernels.captured.model import capture_with
from support.captured.models import LAYERS, adapted
from support.captured.standin import StandIn
from support.models import token_ids

pytestmark = [
    # Trainer on a CPU: of its data loader's pinned memory.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
    # What PEFT asks of transformers under an older name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]


def trained(
    folder: Path, callback: Any = None, *, steps: int = 5, model: nn.Module | None = None,
    **options: Any,
) -> tuple[nn.Module, list[float]]:  # fmt: skip
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model = adapted() if model is None else model
    accumulation = options.get("gradient_accumulation_steps", 1)
    ids = token_ids(batch=2 * steps * accumulation)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=2, max_steps=steps, use_cpu=True,
            report_to=[], logging_steps=1, disable_tqdm=True, learning_rate=1e-2, seed=1,
            save_strategy=options.pop("save_strategy", "no"), **options,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        eval_dataset=[{"input_ids": row, "labels": row} for row in ids[:2]],
        callbacks=[callback] if callback else [],
    )  # fmt: skip
    trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    engine = StandIn()
    monkeypatch.setattr(
        callbacks, "capture", lambda model, **options: capture_with(model, engine, **options)
    )
    return engine


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
        {"max_grad_norm": 0.1, "weight_decay": 0.1},
    ],
    ids=["accumulation", "evaluation and saving", "clipping"],
)
def test_losses_and_parameters_are_those_of_eager_steps(
    tmp_path: Path, engine: StandIn, options: dict[str, Any]
) -> None:
    callback = CaptureCallback()
    model, losses = trained(tmp_path / "captured", callback, **options)
    plain, expected = trained(tmp_path / "plain", **options)
    assert losses == expected
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other), name
    forwards = 5 * options.get("gradient_accumulation_steps", 1) - 2
    assert engine.forwards == engine.backwards == LAYERS * forwards
    # Released again.
    assert callback.captured is None
    assert not any("forward" in vars(block) for block in model.backbone.layers)
    saved = sorted(path.name for path in (tmp_path / "captured").rglob("*.safetensors"))
    assert saved == sorted(path.name for path in (tmp_path / "plain").rglob("*.safetensors"))


def test_checkpointing_in_trainer(tmp_path: Path, engine: StandIn) -> None:
    if checkpoints_outside(adapted().backbone.layers[0]):
        pytest.skip("this transformers checkpoints around a block's forward")
    options = {"gradient_checkpointing": True}
    _, losses = trained(tmp_path, CaptureCallback(), **options)
    assert all(section.checkpointed for section in engine.captured)
    assert losses == trained(tmp_path, **options)[1]
    assert engine.backwards == 3 * LAYERS


def test_peft_lora(tmp_path: Path, engine: StandIn) -> None:
    peft = pytest.importorskip("peft")
    from support.models import build

    def model() -> nn.Module:
        config = peft.LoraConfig(r=2, target_modules=["in_proj"], lora_dropout=0.2)
        return peft.get_peft_model(build("mamba2", num_hidden_layers=LAYERS), config)

    torch.manual_seed(0)
    _, losses = trained(tmp_path, CaptureCallback(), model=model())
    torch.manual_seed(0)
    _, expected = trained(tmp_path, model=model())
    assert losses == expected
    assert engine.backwards == 3 * LAYERS
    assert all(section.draws for section in engine.captured)


def test_trl(tmp_path: Path, engine: StandIn) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from support.tiny_model import byte_tokenizer

    def losses(callback: Any) -> list[float]:
        torch.manual_seed(0)
        tokenizer = byte_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        trainer = trl.SFTTrainer(
            model=adapted(),
            args=trl.SFTConfig(
                output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=4, bf16=False,
                use_cpu=True, report_to=[], logging_steps=1, disable_tqdm=True, save_strategy="no",
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_dict({"input_ids": token_ids(8, 16).tolist()}),
            processing_class=tokenizer, callbacks=[callback] if callback else [],
        )  # fmt: skip
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    found = losses(CaptureCallback())
    assert engine.forwards == engine.backwards == 2 * LAYERS
    assert found == losses(None)


def test_options_reach_capture(tmp_path: Path) -> None:
    callback = CaptureCallback(batch_size=0)
    with pytest.raises(CaptureError, match="on a CUDA device"):
        trained(tmp_path, callback)


@pytest.mark.parametrize(("pinned", "before"), [(True, False), (False, False), (True, True)])
def test_pinned_batches_are_copied_without_waiting(
    engine: StandIn, pinned: bool, before: bool
) -> None:
    """While training runs; what the user has chosen comes back."""
    loader: Any = DataLoaderShard([1], pin_memory=pinned, _non_blocking=before)
    callback = CaptureCallback()
    callback.on_train_begin(None, None, None, model=adapted(), train_dataloader=loader)
    assert loader._non_blocking is (pinned or before)
    callback.release()
    assert loader._non_blocking is before


def test_an_error_in_training_can_be_cleaned_up(tmp_path: Path, engine: StandIn) -> None:
    callback = CaptureCallback()
    model = adapted()
    callback.on_train_begin(None, None, None, model=model)
    assert all("forward" in vars(block) for block in model.backbone.layers)
    callback.release()
    assert not any("forward" in vars(block) for block in model.backbone.layers)
