"""A merged model is no wider than its checkpoint, and is still checked against what was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prodial_kernels.models.loading.load import load_model
from prodial_kernels.training import merging
from prodial_kernels.training.adapted import load_adapted, merge_to_directory
from prodial_kernels.training.merging import MergeError
from support import tiny_run
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
        merging, "_cast_parameters", lambda model, dtype: narrow(spoilt(model), dtype)
    )
    with pytest.raises(MergeError, match="does not compute what was merged"):
        merge_to_directory(None, run.adapter_dir, place / "spoilt", device="cpu")
    assert not (place / "spoilt").exists()


def spoilt(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        model.get_parameter("backbone.layers.0.mixer.out_proj.weight")[0, 0] += 0.01
    return model


def test_a_checkpoint_of_several_dtypes_is_not_rounded(place: Path, tmp_path: Path) -> None:
    tiny_mamba2().bfloat16().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = "backbone.layers.0.mixer.A_log"
    tensors[name] = tensors[name].float()
    save_file(tensors, file, metadata={"format": "pt"})
    for folder, expected in ((tmp_path, None), (place, torch.bfloat16)):
        loaded = load_model(str(folder / "model"), device=torch.device("cpu"), dtype=torch.float32)
        assert loaded.stored_dtype == expected
