"""``prodial merge --stored``: an adapter folded into a quantised checkpoint, in its own layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prodial_kernels import (
    ProdialConfig,
    apply_prodial,
    load_adapter,
    merge_quantized,
    quantize_model,
)
from prodial_kernels import save_adapter as save
from prodial_kernels.cli.commands import main
from prodial_kernels.models.loading.load import load_model
from prodial_kernels.models.loading.stored_again import write_stored_again
from prodial_kernels.quantization import QuantizedLinear
from prodial_kernels.training.adapted import merge_stored
from support.models import randomise_adapters, token_ids
from support.stored.checkpoints import PROJECTORS, pack, pack_whole, packed, write
from support.tiny_model import write_tiny_model

CPU = torch.device("cpu")
METHODS = ("gptq", "gptq_v2", "awq", "compressed-tensors", "modelopt", "fp8 by rows",
           "int8 by rows", "fine-grained fp8", "nf4", "bitsandbytes int8")  # fmt: skip


def checkpoint(folder: Path, method: str) -> Path:
    """A tiny model whose projectors are stored so; of AWQ, those with rows in eights."""
    write_tiny_model(folder)
    if method in ("modelopt", "fp8 by rows"):
        pack_whole(folder, "modelopt" if method == "modelopt" else "compressed-tensors", PROJECTORS)
    elif method == "int8 by rows":
        pack_int8(folder)
    elif method in ("fine-grained fp8", "nf4", "bitsandbytes int8"):
        pack_own(folder, method)
    elif method == "gptq_v2":
        # The zero points of another version are other zero points; all that is asked for here.
        pack(folder, packed("gptq") | {"checkpoint_format": "gptq_v2"}, PROJECTORS)
    else:
        pack(folder, packed(method), PROJECTORS[1:] if method == "awq" else PROJECTORS)
    return folder


def pack_int8(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith(PROJECTORS)]:
        weight = tensors[name].float()
        scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
        tensors[name] = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
        tensors[name.replace(".weight", ".weight_scale")] = scale
    config = packed("compressed-tensors", "int-quantized", num_bits=8, symmetric=True)
    config["config_groups"]["group_0"]["weights"] |= {"strategy": "channel", "group_size": None}
    write(folder, tensors, config)


def pack_own(folder: Path, method: str) -> None:
    """The formats that are made here, by the names that their libraries have for them."""
    format = {"fine-grained fp8": "fp8", "nf4": "nf4", "bitsandbytes int8": "int8"}[method]
    model: Any = load_model(str(folder), device=CPU, dtype=torch.float32).model
    quantize_model(model, format)
    state = {name: t.clone().contiguous() for name, t in model.state_dict().items()}
    bnb = {"quant_method": "bitsandbytes", "load_in_4bit": format == "nf4",
           "load_in_8bit": format == "int8", "bnb_4bit_quant_type": "nf4",
           "bnb_4bit_use_double_quant": True}  # fmt: skip
    fine = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    write(folder, state, fine if format == "fp8" else bnb)


def loaded(folder: Path) -> Any:
    return load_model(str(folder), device=CPU, dtype=torch.float32).model


def adapter(folder: Path, place: Path, *, trained: bool = True) -> Tensor:
    """Save an adapter of the model; return what the adapted one computes."""
    model = loaded(folder)
    targets = [p for p in ("in_proj", "out_proj") if _is_stored(model, p)]
    apply_prodial(model, ProdialConfig(r=2, target_modules=targets))
    if trained:
        randomise_adapters(model)
    save(model, place)
    return logits(model)


def _is_stored(model: Any, name: str) -> bool:
    return any(
        isinstance(m, QuantizedLinear) for path, m in model.named_modules() if path.endswith(name)
    )


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=token_ids(), use_cache=False).logits


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def file_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_checkpoint_is_in_the_same_layout(method: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "base", method)
    adapted = adapter(folder, tmp_path / "adapter")
    result = merge_stored(str(folder), tmp_path / "adapter", tmp_path / "merged", device="cpu")
    before, after = file_of(folder), file_of(tmp_path / "merged")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        # Text of bitsandbytes', with a number in it.
        assert ".quant_state." in name or tensor.shape == after[name].shape
        assert tensor.dtype == after[name].dtype
    stored = [n for n in before if "_proj." in n and (method != "awq" or "out_proj" in n)]
    others = [n for n in before if n not in stored]
    assert others
    assert all(same(before[n], after[n]) for n in others)
    config = (folder / "config.json").read_bytes()
    assert (tmp_path / "merged" / "config.json").read_bytes() == config
    # The codes are those of W', to the format's own error.
    base, merged = logits(loaded(folder)), logits(loaded(tmp_path / "merged"))
    assert (merged - adapted).norm() < 0.5 * (base - adapted).norm()
    assert 0 < max(error.relative_rms for error in result.report.errors.values()) < 0.3
    # And what merge_quantized makes in memory is what was written.
    model = loaded(folder)
    load_adapter(model, tmp_path / "adapter")
    merge_quantized(model, "stored")
    torch.testing.assert_close(logits(model), merged, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("nf4", "bitsandbytes int8")])
def test_an_adapter_that_changes_nothing_gives_the_same_file(method: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "base", method)
    adapter(folder, tmp_path / "adapter", trained=False)
    merge_stored(str(folder), tmp_path / "adapter", tmp_path / "merged", device="cpu")
    before, after = file_of(folder), file_of(tmp_path / "merged")
    for name, tensor in before.items():
        assert same(tensor, after[name]), name


def test_shards_stay_shards_and_what_lies_beside_comes_along(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "base", "gptq")
    tensors = file_of(folder)
    # A layer's entries in two files.
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({n: tensors[n] for n in own}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f for f, own in parts.items() for n in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    adapter(folder, tmp_path / "adapter")
    merge_stored(str(folder), tmp_path / "adapter", tmp_path / "merged", device="cpu")
    for file, own in parts.items():
        assert sorted(load_file(tmp_path / "merged" / file)) == own
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert logits(loaded(tmp_path / "merged")).isfinite().all()


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "base", "compressed-tensors")
    adapter(folder, tmp_path / "adapter")
    places = ["--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    assert main(["merge", "--model", str(folder), *places, "--stored", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "largest error in" in said
    assert "rounded and unmerged logits differ by" in said
    assert main(["merge", "--model", str(folder), *places, "--stored", "--quantize", "nf4"]) == 1
    assert "--quantize would have no effect with --stored" in capsys.readouterr().err


def test_a_dense_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "base")
    model = loaded(folder)
    apply_prodial(model, ProdialConfig(r=2))
    save(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="is stored dense, and is merged to a dense model"):
        merge_stored(str(folder), tmp_path / "adapter", tmp_path / "merged", device="cpu")


def test_a_tied_head_that_was_trained(tmp_path: Path) -> None:
    """Is written where the checkpoint has it; one that is tied no longer has no place there."""
    folder = checkpoint(tmp_path / "base", "gptq")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = {name: t for name, t in file_of(folder).items() if name != "lm_head.weight"}
    write(folder, tensors, config["quantization_config"])
    model = loaded(folder)
    apply_prodial(model, ProdialConfig(r=2, modules_to_save=("lm_head",)))
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    save(model, tmp_path / "adapter")
    merge_stored(str(folder), tmp_path / "adapter", tmp_path / "merged", device="cpu")
    assert torch.equal(logits(loaded(tmp_path / "merged")), logits(model))
    plain = loaded(folder)
    plain.lm_head.weight = nn.Parameter(plain.lm_head.weight.clone())
    with pytest.raises(ValueError, match=r"no place for lm_head\.weight"):
        write_stored_again(plain, {}, folder, tmp_path)
