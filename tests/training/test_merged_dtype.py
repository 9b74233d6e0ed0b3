"""A merged model is no wider than its checkpoint, and is still checked against what was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prodial_kernels import ProdialConfig, apply_prodial, save_adapter
from prodial_kernels.models.loading.load import load_model
from prodial_kernels.training import merging
from prodial_kernels.training.adapted import load_adapted, merge_to_directory
from prodial_kernels.training.merging import MergeError
from support import tiny_run
from support.models import build
from support.tiny_model import byte_tokenizer, tiny_mamba2, write_text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bf16")
    tiny_mamba2().bfloat16().save_pretrained(place / "model")
    byte_tokenizer().save_pretrained(place / "model")
    write_text(place / "text.txt")
    return place


@pytest.fixture(scope="module")
def run(place: Path) -> tiny_run.FinetuneResult:
    return tiny_run.run(place, place / "run", steps=4, eval_every=0)


def dtypes(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


def test_a_run_writes_what_its_base_is_stored_in(place: Path, run: tiny_run.FinetuneResult) -> None:
    assert dtypes(run.model_dir) == {torch.bfloat16}
    size = (place / "model" / "model.safetensors").stat().st_size
    assert (run.model_dir / "model.safetensors").stat().st_size < 1.01 * size
    assert 0 < run.agreement.relative <= run.agreement.relative_tolerance
    adapted = load_adapted(None, run.adapter_dir, device="cpu").model
    merged = tiny_run.load(run.model_dir)
    ids = torch.randint(0, 257, (2, 30))
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0.02, atol=0.02)
    for name, parameter in merged.named_parameters():
        if "_proj" not in name:
            assert torch.equal(parameter, adapted.get_parameter(name)), name


def test_merge_follows_too_unless_told_otherwise(
    place: Path, run: tiny_run.FinetuneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_to_directory(None, run.adapter_dir, place / "auto", device="cpu")
    assert dtypes(place / "auto") == {torch.bfloat16}
    merge_to_directory(None, run.adapter_dir, place / "wide", device="cpu", dtype="float32")
    assert dtypes(place / "wide") == {torch.float32}
    # Rounding hides nothing else: neither a wrong merge nor a wrong file.
    narrow = merging._cast_parameters
    monkeypatch.setattr(
        merging, "_cast_parameters", lambda model, *how: narrow(spoilt(model), *how)
    )
    with pytest.raises(MergeError, match="does not compute what was merged"):
        merge_to_directory(None, run.adapter_dir, place / "spoilt", device="cpu")
    assert not (place / "spoilt").exists()


def spoilt(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        model.get_parameter("backbone.layers.0.mixer.out_proj.weight")[0, 0] += 0.01
    return model


@pytest.mark.parametrize(
    ("name", "wide"), [("zamba", ".A_log"), ("nemotron_h", ".gate.weight"), ("mamba2", None)]
)
def test_what_a_checkpoint_stores_wider_stays_so(
    name: str, wide: str | None, tmp_path: Path
) -> None:
    """transformers keeps these parameters in fp32, and saves a 16-bit model in two dtypes."""
    build(name, vocab_size=264).bfloat16().save_pretrained(tmp_path / "first")
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    kept.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    wider = {key for key, tensor in stored.items() if tensor.dtype == torch.float32}
    assert any(key.endswith(str(wide)) for key in wider) is (wide is not None)
    base = str(tmp_path / "base")
    loaded = load_model(base, device=torch.device("cpu"), dtype=torch.float32)
    assert loaded.stored_dtype == torch.bfloat16
    assert loaded.stored_wider == wider
    apply_prodial(loaded.model, ProdialConfig(r=2, n_blocks=2))
    save_adapter(loaded.model, tmp_path / "adapter", base_model=base)
    merge_to_directory(None, tmp_path / "adapter", tmp_path / "merged", device="cpu")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {key: t.dtype for key, t in merged.items()} == {k: t.dtype for k, t in stored.items()}
    for key in wider:
        assert torch.equal(merged[key], stored[key]), key
