"""What ``save_adapter`` writes, read by PEFT and transformers as if PEFT had written it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from prodial_kernels import ProdialConfig, apply_prodial, load_adapter, save_adapter
from prodial_kernels.peft import ProdialPeftConfig
from support.models import build, randomise_adapters, token_ids
from support.peft_models import LOADS_INTO_TRANSFORMERS, logits

IDS = token_ids()
CONFIGS = {
    "everything": ProdialConfig(r=3, lora_alpha=6, n_blocks={"in_proj": 4, "out_proj": 2}),
    "LoRA": ProdialConfig(r=2, train_scale=False, train_diagonal=False),
    "one plain name": ProdialConfig(r=2, target_modules="in_proj", diagonal="free"),
    "an expression": ProdialConfig(
        r=0, target_modules=r".*\.1\.mixer\.(in|out)_proj", block_size=4, allow_partial=True
    ),
}


def saved(config: ProdialConfig, directory: Path) -> torch.Tensor:
    """Save an adapter, and return what its model computes."""
    base = build("mamba2")
    base.save_pretrained(directory / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(directory / "base")
    apply_prodial(model, config)
    randomise_adapters(model)
    save_adapter(model, directory / "adapter", base_model=str(directory / "base"))
    return logits(model, IDS)


def base(directory: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(directory / "base")
    return model


@pytest.mark.parametrize("case", CONFIGS)
def test_peft_reads_it(case: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    expected = saved(CONFIGS[case], tmp_path)
    model = PeftModel.from_pretrained(base(tmp_path), tmp_path / "adapter")
    assert torch.equal(logits(model, IDS), expected)
    assert not [w for w in recwarn if "Unexpected keyword" in str(w.message)]
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(found, IDS), expected)
    assert "`PeftModel.from_pretrained(" in (tmp_path / "adapter" / "README.md").read_text()
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert isinstance(config, ProdialPeftConfig)
    assert (config.task_type, config.inference_mode) == ("CAUSAL_LM", True)


@pytest.mark.skipif(not LOADS_INTO_TRANSFORMERS, reason="this PEFT loses its tensors")
def test_transformers_reads_it(tmp_path: Path) -> None:
    expected = saved(CONFIGS["everything"], tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(model, IDS), expected)
    plain: Any = base(tmp_path)
    plain.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(plain, IDS), expected)


def test_peft_writes_its_own_of_it_and_keeps_both(tmp_path: Path) -> None:
    expected = saved(CONFIGS["everything"], tmp_path)
    model = PeftModel.from_pretrained(base(tmp_path), tmp_path / "adapter")
    model.save_pretrained(tmp_path / "theirs")
    written = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert "tensors_sha256" not in written
    again = PeftModel.from_pretrained(base(tmp_path), tmp_path / "theirs")
    assert torch.equal(logits(again, IDS), expected)
    # And this package goes on reading its own.
    own = base(tmp_path)
    load_adapter(own, tmp_path / "adapter")
    assert torch.equal(logits(own, IDS), expected)


def test_what_peft_has_no_place_for_is_no_adapter_to_it(tmp_path: Path) -> None:
    for config in (ProdialConfig(modules_to_save=["norm_f"]), ProdialConfig(train_ssm=["D"])):
        saved(config, tmp_path)
        with pytest.raises(KeyError, match="peft_type"):
            PeftModel.from_pretrained(base(tmp_path), tmp_path / "adapter")
