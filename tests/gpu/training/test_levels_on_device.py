"""Whole runs at the last levels of the memory plan, and with upstream's kernels tuned before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prodial_kernels.training import FinetuneConfig, finetune
from prodial_kernels.training.step.tuning import upstream_tuners
from support import mamba_ssm_loaded  # noqa: F401
from support.tiny_model import byte_tokenizer, write_text

pytestmark = pytest.mark.gpu

MIB = 2**20


def write_model(folder: Path) -> None:
    """A NemotronH of four blocks, with 64 experts of 2 × 6 MiB that a batch takes two by two."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    torch.manual_seed(0)
    config = NemotronHConfig(
        vocab_size=264, hidden_size=1024, layers_block_type=["mamba", "moe", "attention", "mamba"],
        mamba_num_heads=16, mamba_head_dim=64, ssm_state_size=64, n_groups=1, chunk_size=64,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, intermediate_size=1024,
        moe_intermediate_size=1536, moe_shared_expert_intermediate_size=512, n_routed_experts=64,
        num_experts_per_tok=2, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model: Any = NemotronHForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("levels")
    write_model(folder / "model")
    write_text(folder / "text.txt", documents=200)
    return folder


def run(place: Path, name: str, **options: Any) -> Any:
    torch.cuda.empty_cache()
    config = FinetuneConfig(
        model=str(place / "model"), data=str(place / "text.txt"), steps=4, batch_size=2,
        seq_len=256, eval_tokens=512, output=str(place / name), device="cuda", dtype="bfloat16",
        lr=1e-4, warmup=0, **options,
    )  # fmt: skip
    return finetune(config, progress=False)


def test_experts_and_inputs_that_wait_in_the_hosts_memory(place: Path) -> None:
    stored = {"quantize": "nf4", "quantize_modules": "all"}
    near = run(place, "near", **stored, activations="checkpoint", experts="device")
    far = run(place, "far", **stored, activations="offload", experts="host")
    assert near.memory["plan"]["streamed"] == near.memory["plan"]["sent"] == 0
    # 64 experts of two matrices, half a byte a value.
    assert far.memory["plan"]["streamed"] > 90 * MIB
    assert far.memory["plan"]["sent"] > 0
    assert set(far.memory["plan"]["levels"]) == {"offload"}
    # The same products of the same weights.
    assert far.after["loss"] == pytest.approx(near.after["loss"], rel=2e-3)
    assert far.after["loss"] != far.before["loss"]
    taken = {name: r.memory["measured"]["allocated"] for name, r in (("n", near), ("f", far))}
    assert taken["f"] < taken["n"] - 40 * MIB
    for result in (near, far):
        planned = result.memory["plan"]["allocated"]
        off = abs(result.memory["measured"]["allocated"] - planned)
        assert off <= max(0.02 * planned, 32 * MIB), result.memory


def test_upstreams_kernels_tune_within_the_budget(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tuner in upstream_tuners():
        # Two of dozens: quick, and both are timed.
        monkeypatch.setattr(tuner, "configs", (tuner.configs * 2)[:2])
        monkeypatch.setattr(tuner, "cache", {})
    result = run(place, "tuned", activations="checkpoint", memory_budget="2.5GB", experts="device")
    plan, measured = result.memory["plan"], result.memory["measured"]
    assert plan["tuning"] > 256 * MIB
    assert any(tuner.cache for tuner in upstream_tuners())
    # Not counted as the run's, and nothing of it is left to a step.
    off = abs(measured["allocated"] - plan["allocated"])
    assert off <= max(0.02 * plan["allocated"], 32 * MIB), result.memory
