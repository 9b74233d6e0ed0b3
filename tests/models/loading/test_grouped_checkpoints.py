"""GPTQ, AWQ and compressed-tensors checkpoints: read bit for bit by tensors, trained on, merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prodial_kernels.models.loading.load import ModelError, load_model
from support.models import build
from support.stored.checkpoints import PROJECTORS, pack, packed, write
from support.stored.trained_and_merged import check_training_and_merging, stored_layers
from support.tiny_model import byte_tokenizer, write_tiny_model

CPU = torch.device("cpu")


def read(folder: Path, **options: Any) -> Any:
    return load_model(str(folder), device=CPU, dtype=torch.float32, **options).model


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_a_model_is_read_trained_on_and_merged(method: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    if method == "awq":
        # Eight rows in a word, which in_proj of this model has not.
        exact = pack(folder, packed(method), PROJECTORS[1:])
    else:
        exact = pack(folder, packed(method), PROJECTORS)
    stored = stored_layers(read(folder))
    assert {f"{name}.weight" for name in stored} == exact.keys()
    for name, layer in stored.items():
        assert layer.FORMAT == "groups"
        assert torch.equal(layer.weight, exact[f"{name}.weight"])
    if method == "awq":
        return
    check_training_and_merging(folder, tmp_path, exact)


def test_experts_are_read_dense_and_stored_again(tmp_path: Path) -> None:
    model: Any = build("nemotron_h", hidden_size=32)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    if not any(".experts." in name and name.endswith("up_proj.weight") for name in written):
        pytest.skip("this transformers writes experts as one tensor")
    exact = pack(tmp_path, packed("compressed-tensors"), ("up_proj.weight", "down_proj.weight"))
    experts = next(m for n, m in read(tmp_path).named_modules() if n.endswith(".experts"))
    of_experts = [name for name in exact if ".experts.1.up_proj" in name]
    assert torch.equal(experts.up_proj[1], exact[of_experts[0]])
    stored = read(tmp_path, quantize="nf4", quantize_modules="all")
    kinds = {type(m).__name__ for n, m in stored.named_modules() if n.endswith(".experts")}
    assert kinds == {"QuantizedExperts"}


def test_groups_of_several_formats(tmp_path: Path) -> None:
    """int4, int8 by rows and FP8 in one checkpoint, as llm-compressor writes mixed ones."""
    folder = write_tiny_model(tmp_path / "model")
    exact = pack(folder, packed("compressed-tensors"), ("layers.0.mixer.in_proj.weight",))
    tensors = load_file(folder / "model.safetensors")
    for path, most, codes in (
        ("backbone.layers.0.mixer.out_proj", 448, torch.float8_e4m3fn),
        ("backbone.layers.1.mixer.out_proj", 127, torch.int8),
    ):
        weight = tensors[f"{path}.weight"].float()
        scale = (weight.abs().amax(1, keepdim=True) / most).bfloat16()
        rounded = weight / scale.float()
        rounded = rounded.round() if codes == torch.int8 else rounded
        tensors[f"{path}.weight"] = rounded.clamp(-most, most).to(codes)
        tensors[f"{path}.weight_scale"] = scale
        exact[f"{path}.weight"] = tensors[f"{path}.weight"].float() * scale.float()
    config = packed("compressed-tensors", "mixed-precision")
    groups = config["config_groups"]
    groups["group_0"]["format"] = "pack-quantized"
    plain = {"strategy": "channel", "symmetric": True, "group_size": None, "num_bits": 8}
    groups["a"] = {"format": "float-quantized", "weights": {**plain, "type": "float"}}
    groups["b"] = {"format": "int-quantized", "weights": {**plain, "type": "int"}}
    write(folder, tensors, config)
    stored = stored_layers(read(folder))
    assert {layer.FORMAT for layer in stored.values()} == {"groups", "int8", "fp8"}
    for name, layer in stored.items():
        assert torch.equal(layer.weight, exact[f"{name}.weight"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (packed("gptq") | {"bits": 5}, "bits=5"),
        (packed("gptq") | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        (packed("gptq") | {"pack_dtype": "int16"}, "pack_dtype='int16'"),
        (packed("awq") | {"version": "gemv"}, "version='gemv'"),
        (packed("awq") | {"bits": 8}, "bits=8"),
        (packed("compressed-tensors", actorder="group"), "weights.actorder='group'"),
        (packed("compressed-tensors", strategy="tensor_group"), "strategy='tensor_group'"),
        (packed("compressed-tensors", "nvfp4-pack-quantized"), "format='nvfp4-pack-quantized'"),
    ],
)
def test_what_is_not_read_is_named(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    pack(folder, config, PROJECTORS[1:])
    with pytest.raises(ModelError, match=message) as caught:
        read(folder)
    assert "Use the dense checkpoint" in str(caught.value)


@pytest.mark.parametrize("entry", ["qzeros", "scales", "qweight"])
def test_an_entry_that_is_missing_or_damaged(entry: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    pack(folder, packed("gptq"), PROJECTORS[1:])
    tensors = load_file(folder / "model.safetensors")
    name = f"backbone.layers.0.mixer.out_proj.{entry}"
    tensors[name] = tensors[name][:-1].contiguous()
    write(folder, tensors, packed("gptq"))
    with pytest.raises(ModelError, match=r"layers\.0\.mixer\.out_proj: "):
        read(folder)
    del tensors[name]
    write(folder, tensors, packed("gptq"))
    with pytest.raises(ModelError, match=f"lacks its entry {entry}"):
        read(folder)
