"""Experts in the host's memory, and runs whose upstream kernels tune first, on the real kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.models.layers.recompute import OFFLOAD, apply_levels
from prodial_kernels.models.loading.load import load_model
from prodial_kernels.quantization.modules.host_experts import HostStack
from prodial_kernels.training import FinetuneConfig, finetune
from prodial_kernels.training.step.tuning import upstream_tuners
from support import mamba_ssm_loaded  # noqa: F401
from support.models import build, randomise_adapters, token_ids
from support.tiny_model import byte_tokenizer, write_text

pytestmark = pytest.mark.gpu

MIB = 2**20
OPTIONS: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 256, "mamba_num_heads": 8, "mamba_head_dim": 64,
    "ssm_state_size": 32, "chunk_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("levels")
    model: Any = build("nemotron_h", **OPTIONS)
    model.bfloat16().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    write_text(folder / "text.txt", documents=200)
    return folder


def test_experts_and_inputs_that_wait_in_the_hosts_memory(place: Path) -> None:
    ids = token_ids(2, 128).cuda()
    found = []
    for on_host in (False, True):
        model: Any = load_model(
            str(place / "model"), device=torch.device("cuda"), dtype=torch.bfloat16,
            quantize="nf4", quantize_modules="all", experts_on_host=on_host,
        ).model  # fmt: skip
        stacks = [module for module in model.modules() if isinstance(module, HostStack)]
        assert bool(stacks) is on_host
        apply_prodial(model, ProdialConfig(r=8))
        randomise_adapters(model)
        model.train()
        levels = [OFFLOAD if on_host else "keep"] * 4
        with apply_levels(model, levels):
            # Twice: what was on its way the first time is there.
            for _ in range(2):
                model.zero_grad(set_to_none=True)
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append((float(loss.detach()), gradients))
    (near, gradients), (far, others) = found
    assert far == pytest.approx(near, rel=1e-3)
    for name, gradient in gradients.items():
        # Sums of the scan's backward come in any order.
        error = (gradient - others[name]).norm() / gradient.norm()
        assert error < 0.02, f"{name}: {float(error):.1e}"


@pytest.mark.slow
def test_upstreams_kernels_tune_before_the_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tuner in upstream_tuners():
        # Two of dozens, of which the first may be too large for the device.
        monkeypatch.setattr(tuner, "configs", [tuner.configs[0], tuner.configs[-1]])
        monkeypatch.setattr(tuner, "cache", {})
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    config = FinetuneConfig(
        model=str(place / "model"), data=str(place / "text.txt"), steps=2, batch_size=2,
        seq_len=128, eval_tokens=256, output=str(tmp_path / "run"), device="cuda",
        dtype="bfloat16", memory_budget="8GB", warmup=0,
    )  # fmt: skip
    result = finetune(config, progress=False)
    assert result.steps == 2
    assert result.memory is not None
    assert result.memory["plan"]["tuning"] > 256 * MIB
    assert result.memory["plan"]["tuning_tokens"] == 128
    assert any(tuner.cache for tuner in upstream_tuners())
    # What Triton clears between two timings is not counted as the run's.
    taken = result.memory["measured"]["allocated"] - held
    assert taken < result.memory["plan"]["tuning"]
