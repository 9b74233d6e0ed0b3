"""The trainers that people have: transformers' Trainer, TRL's SFT and DPO."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

import prodial_kernels.peft
from support.mixers.adapted_families import install_stand_in
from support.models import token_ids
from support.peft_models import MIXES_METHODS, adapted, config, layers, logits
from support.tiny_model import byte_tokenizer, tiny_mamba2, write_tiny_model

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    # PEFT before 0.21, of a model that was made in memory.
    "ignore:Could not find a config file",
)

IDS = token_ids()
ROWS = [{"input_ids": row, "labels": row} for row in token_ids(8, 12, seed=3)]
QUIET: dict[str, Any] = {
    "report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no",
    "save_strategy": "no", "per_device_train_batch_size": 2,
}  # fmt: skip


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), **{**QUIET, "max_steps": 4, "learning_rate": 1e-2, **options}
    )
    return Trainer(model=model, args=arguments, train_dataset=ROWS)


def fresh() -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(tiny_mamba2(), config(task_type="CAUSAL_LM", lora_dropout=0.1))


def factors(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".prodial_" in n}


def test_checkpoints_hold_the_adapter_alone_and_resume_exactly(tmp_path: Path) -> None:
    whole = trainer(fresh(), tmp_path / "whole")
    whole.train()
    first = trainer(fresh(), tmp_path / "run", save_strategy="steps", save_steps=2)
    first.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 4
    assert all(".prodial_" in name for name in tensors)
    assert not list(checkpoint.glob("model*"))

    resumed = trainer(fresh(), tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4
    expected = factors(whole.model)
    for name, tensor in factors(resumed.model).items():
        assert torch.equal(tensor, expected[name]), name
    assert get_last_checkpoint(str(tmp_path / "run")).endswith("checkpoint-4")

    resumed.save_model(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(tiny_mamba2(), tmp_path / "saved")
    assert torch.equal(logits(again, IDS), logits(resumed.model, IDS))


def test_weight_decay_pulls_towards_the_pretrained_layer(tmp_path: Path) -> None:
    model = fresh()
    with torch.no_grad():
        for layer in layers(model):
            layer.prodial_scale.fill_(0.5)
    # No gradient can reach this: only decay moves it.
    for parameter in model.parameters():
        parameter.register_hook(torch.zeros_like) if parameter.requires_grad else None
    trainer(model, tmp_path, weight_decay=0.1, lr_scheduler_type="constant").train()
    for layer in layers(model):
        kept = layer.prodial_scale
        torch.testing.assert_close(kept, torch.full_like(kept, 0.5 * (1 - 1e-2 * 0.1) ** 4))


@pytest.mark.skipif(not MIXES_METHODS, reason="this PEFT saves one method only")
def test_both_methods_in_one_checkpoint(tmp_path: Path) -> None:
    from support.models import build

    def model() -> PeftModel:
        torch.manual_seed(1)
        lora = LoraConfig(r=2, target_modules=["q_proj"])
        return get_peft_model(build("falcon_h1"), config(task_type="CAUSAL_LM", lora=lora))

    whole = trainer(model(), tmp_path / "whole")
    whole.train()
    trainer(model(), tmp_path / "run", save_strategy="steps", save_steps=2).train()
    resumed = trainer(model(), tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(logits(resumed.model, IDS), logits(whole.model, IDS))


def test_flattened_rows_end_a_trainer(tmp_path: Path) -> None:
    model = fresh()
    arguments = TrainingArguments(str(tmp_path), **QUIET, max_steps=1)
    flattening = DataCollatorWithFlattening(return_seq_idx=True)
    rows = [{"input_ids": row["input_ids"].tolist()} for row in ROWS]
    packing = Trainer(model, arguments, train_dataset=rows, data_collator=flattening)
    with pytest.raises(ValueError, match="run into the next"):
        packing.train()


def test_flattened_rows_train_where_documents_stay_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer turns the cache off, which the guard asks for; evaluation goes the same way."""
    install_stand_in(monkeypatch, "bamba")
    model = adapted("bamba", task_type="CAUSAL_LM")
    before = factors(model)
    flattening = DataCollatorWithFlattening(return_seq_idx=True)
    rows = [{"input_ids": row["input_ids"].tolist()} for row in ROWS]
    arguments = TrainingArguments(str(tmp_path), **QUIET, max_steps=1, learning_rate=1e-2)
    Trainer(model, arguments, train_dataset=rows, data_collator=flattening).train()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in factors(model).items())


# --- TRL, which the tests' dependencies do not include. ------------------------------------------


@pytest.fixture
def trl() -> Any:
    return pytest.importorskip("trl")


@pytest.fixture
def datasets(trl: Any) -> Any:
    return pytest.importorskip("datasets")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "base")


TRL_QUIET = {**QUIET, "max_steps": 2, "max_length": 32, "bf16": False, "learning_rate": 1e-2}


def sft(trl: Any, datasets: Any, base: Path, folder: Path, **options: Any) -> Any:
    rows = datasets.Dataset.from_dict({"text": [f"the number {i}" for i in range(4)]})
    made = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=trl.SFTConfig(str(folder), **{**TRL_QUIET, **options}),
        train_dataset=rows,
        processing_class=byte_tokenizer(),
        peft_config=config(task_type="CAUSAL_LM"),
    )
    made.train()
    return made


# It warns that packing needs an attention that splits rows; nothing does for a recurrence.
@pytest.mark.filterwarnings("ignore:.*(flash|Flash|attention implementation)")
@pytest.mark.parametrize("options", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_packed_rows_that_would_leak_end_a_trainer_of_trl(
    trl: Any, datasets: Any, base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="run into the next"):
        sft(trl, datasets, base, tmp_path / "sft", **options)


def dpo(trl: Any, datasets: Any, model: Any, folder: Path, **options: Any) -> Any:
    rows = datasets.Dataset.from_dict(
        {
            "prompt": [f"number {i} is " for i in range(4)],
            "chosen": ["even"] * 4,
            "rejected": ["odd and so on"] * 4,
        }
    )
    return trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(
            str(folder), **{**TRL_QUIET, "logging_steps": 1, "logging_strategy": "steps"}
        ),
        train_dataset=rows,
        processing_class=byte_tokenizer(),
        **options,
    )


def test_sft(trl: Any, datasets: Any, base: Path, tmp_path: Path) -> None:
    made = sft(trl, datasets, base, tmp_path / "sft")
    assert isinstance(made.model, PeftModel)
    assert all(p.any() for n, p in factors(made.model).items() if "prodial_B" in n)
    made.save_model(str(tmp_path / "adapter"))
    plain = AutoModelForCausalLM.from_pretrained(base)
    again = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert torch.equal(logits(again, IDS), logits(made.model, IDS))


def test_dpo_starts_at_ln_2_without_a_second_model(
    trl: Any, datasets: Any, base: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    made = dpo(trl, datasets, model, tmp_path, peft_config=config(task_type="CAUSAL_LM"))
    assert made.ref_model is None
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[1] < losses[0]


def test_dpo_after_sft_measures_against_sft(
    trl: Any, datasets: Any, base: Path, tmp_path: Path
) -> None:
    tuned = sft(trl, datasets, base, tmp_path / "sft").model
    before = logits(tuned, IDS)
    assert not torch.equal(before, logits(AutoModelForCausalLM.from_pretrained(base), IDS))
    made = dpo(trl, datasets, tuned, tmp_path / "dpo")
    assert made.ref_model is None
    assert set(made.model.peft_config) == {"default", "ref"}
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    made.model.set_adapter("ref")
    assert torch.equal(logits(made.model, IDS), before)
    made.model.set_adapter("default")
    assert not torch.equal(logits(made.model, IDS), before)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
def test_the_example_of_the_page(
    trl: Any, datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(prodial_kernels.peft.__file__).with_name("README.md")
    (block,) = re.findall(r"^```py\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "peft/README.md", "exec"), {})
    assert len(load_file(tmp_path / "sft-adapter" / "adapter_model.safetensors")) == 8 * 2 * 4
