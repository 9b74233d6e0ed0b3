"""FP8 checkpoints with one scale for a weight or a row: read bit for bit, trained on, merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prodial_kernels.models.loading.load import ModelError, load_model
from support.models import build
from support.stored.checkpoints import CONFIGS, pack_whole
from support.stored.trained_and_merged import check_training_and_merging, stored_layers
from support.tiny_model import byte_tokenizer, write_tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("method", CONFIGS)
def test_a_model_is_read_trained_on_and_merged(method: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    exact = pack_whole(folder, method, ("in_proj.weight", "out_proj.weight"))
    model = load_model(str(folder), device=CPU, dtype=torch.float32).model
    stored = stored_layers(model)
    assert {f"{name}.weight" for name in stored} == exact.keys()
    for name, layer in stored.items():
        assert layer.FORMAT == "fp8"
        assert torch.equal(layer.weight, exact[f"{name}.weight"])
    check_training_and_merging(folder, tmp_path, exact)


def test_experts_are_read_dense_and_stored_again(tmp_path: Path) -> None:
    model: Any = build("nemotron_h", hidden_size=32)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    apart = [name for name in written if ".experts." in name]
    if not any(name.endswith("up_proj.weight") for name in apart):
        pytest.skip("this transformers writes experts as one tensor")
    exact = pack_whole(tmp_path, "modelopt", ("up_proj.weight", "down_proj.weight"))
    options: dict[str, Any] = {"device": CPU, "dtype": torch.float32}
    dense: Any = load_model(str(tmp_path), **options).model
    experts = next(m for n, m in dense.named_modules() if n.endswith(".experts"))
    of_experts = [name for name in exact if ".experts.1.up_proj" in name]
    assert of_experts
    assert torch.equal(experts.up_proj[1], exact[of_experts[0]])
    stored: Any = load_model(str(tmp_path), **options, quantize="nf4", quantize_modules="all").model
    kinds = {type(m).__name__ for n, m in stored.named_modules() if n.endswith(".experts")}
    assert kinds == {"QuantizedExperts"}


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        (torch.ones(3), "one scale for a weight, or one for each row"),
        (torch.tensor(float("nan")), "is not finite"),
        (torch.tensor(3, dtype=torch.int32), "scales in floating point"),
        (None, "lacks its entry weight_scale"),
    ],
)
def test_other_scales_are_refused(scale: Tensor | None, reason: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    exact = pack_whole(folder, "modelopt", ("in_proj.weight",))
    file, path = folder / "model.safetensors", next(iter(exact)).removesuffix(".weight")
    tensors = load_file(file)
    del tensors[f"{path}.weight_scale"]
    if scale is not None:
        tensors[f"{path}.weight_scale"] = scale
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=reason if scale is not None else "float8_e4m3fn"):
        load_model(str(folder), device=CPU, dtype=torch.float32)
