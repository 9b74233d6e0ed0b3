"""Fine-tuning on a quantised base: the run, its adapter, merging, dense and quantised."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from prodial_kernels import ProdialConfig, ProdialLinear, apply_prodial, quantize_model
from prodial_kernels.checkpoint import AdapterError, load_adapter
from prodial_kernels.cli.commands import main
from prodial_kernels.models.adapt.inject import merge_quantized
from prodial_kernels.models.loading.load import load_model
from prodial_kernels.quantization import FORMATS, QuantizedLinear
from prodial_kernels.training import FinetuneConfig, FinetuneResult, finetuning
from prodial_kernels.training.adapted import load_adapted, merge_to_directory
from prodial_kernels.training.config import ConfigError
from prodial_kernels.training.merging import has_room_dense
from prodial_kernels.training.run.directory import RunError
from support import tiny_run
from support.models import randomise_adapters

CPU = torch.device("cpu")


def run(place: Path, name: str, *, resume: bool = False, **options: Any) -> FinetuneResult:
    defaults: dict[str, Any] = {
        "steps": 6, "batch_size": 2, "eval_every": 0, "save_every": 3, "warmup": 10,
        "quantize": "nf4",
    }  # fmt: skip
    return tiny_run.run(place, place / name, resume=resume, **{**defaults, **options})


@pytest.fixture(scope="module")
def result(place: Path) -> FinetuneResult:
    return run(place, "run")


def quantised(model: nn.Module) -> list[QuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


def test_a_run_learns_and_merges_into_a_dense_model(result: FinetuneResult) -> None:
    assert result.after["bits_per_byte"] < result.before["bits_per_byte"]
    assert result.agreement.relative < 1e-5
    merged = load_model(str(result.model_dir), device=CPU, dtype=torch.float32)
    assert merged.quantization is None
    assert not quantised(merged.model)


def test_a_run_multiplies_in_fp8_and_says_so_in_its_adapter(place: Path) -> None:
    found = run(place, "fp8", quantize="fp8", compute="fp8")
    assert found.after["bits_per_byte"] < found.before["bits_per_byte"]
    # What is merged rounds nothing, and is compared with what does not.
    assert found.agreement.relative < 1e-5
    loaded = load_adapted(None, found.adapter_dir, device="cpu")
    layers = [m for m in loaded.model.modules() if isinstance(m, ProdialLinear)]
    assert {layer.compute for layer in layers} == {"fp8"}


def test_the_adapter_belongs_to_the_quantised_base(place: Path, result: FinetuneResult) -> None:
    # It has its format recorded.
    for quantize in ("nf4", None):
        adapted = load_adapted(None, result.adapter_dir, device="cpu", quantize=quantize).model
        assert {layer.FORMAT for layer in quantised(adapted)} == {"nf4"}
        assert len(quantised(adapted)) == 4
    with pytest.raises(AdapterError, match=r"does not fit|trained on other weights"):
        load_adapted(None, result.adapter_dir, device="cpu", quantize="int8")
    dense = load_adapted(device="cpu", model=str(place / "model")).model
    with pytest.raises(AdapterError, match=r"trained on other weights .* stored as nf4, and"):
        load_adapter(dense, result.adapter_dir)
    for output, options in (("by-api", {}), ("by-cli", {"cli": True})):
        path = place / output
        if options:
            assert not main(
                ["merge", "--adapter", str(result.adapter_dir), "--output", str(path),
                 "--device", "cpu"]
            )  # fmt: skip
        else:
            agreement = merge_to_directory(
                None, result.adapter_dir, path, device="cpu", quantize="nf4"
            )
            assert agreement.relative < 1e-5
        found = load_model(str(path), device=CPU, dtype=torch.float32).model.state_dict()
        kept = load_model(str(result.model_dir), device=CPU, dtype=torch.float32).model.state_dict()
        assert all(torch.equal(found[name], kept[name]) for name in kept)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_checkpoint_that_is_quantised_throughout(
    place: Path, tmp_path: Path, format: str
) -> None:
    """As transformers makes them with bitsandbytes: more layers than are adapted."""
    model = load_model(str(place / "model"), device=CPU, dtype=torch.float32).model
    quantize_model(model, format, target_modules=("in_proj", "out_proj"))
    entries = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = shutil.copytree(place / "model", tmp_path / "base")
    save_file(entries, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    bits = 4 if format == "nf4" else 8
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", f"load_in_{bits}bit": True, "bnb_4bit_quant_type": "nf4",
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    options = {"quantize": None, "model": str(base), "target_modules": ["out_proj"], "steps": 2}
    done = tiny_run.run(place, tmp_path / "run", **{**options, "batch_size": 2, "eval_every": 0})
    merged = AutoModelForCausalLM.from_pretrained(done.model_dir)
    assert not quantised(merged)
    assert "quantization_config" not in (done.model_dir / "config.json").read_text()
    adapted = load_adapted(None, done.adapter_dir, device="cpu").model
    ids = torch.randint(0, 257, (2, 30))
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits)
    with pytest.raises(ValueError, match=r"'full' trains dense weights.* holds .*_proj"):
        tiny_run.run(place, tmp_path / "full", model=str(base), method="full", steps=1)


def test_resuming_keeps_to_the_format(place: Path, result: FinetuneResult) -> None:
    with pytest.raises(RunError, match=r"quantize \(run: 'nf4', now: 'int8'\)"):
        run(place, "run", resume=True, quantize="int8")
    with pytest.raises(ConfigError, match=r"'full' trains every weight.*quantize"):
        FinetuneConfig(method="full", quantize="nf4")
    with pytest.raises(ConfigError, match="quantize must be one of 'nf4', 'int8', 'fp8'"):
        FinetuneConfig(quantize="int4")


def test_without_room_for_the_dense_model_the_host_merges(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Any] = []
    check = finetuning.check_written_model

    def watched(path: Path, tokens: Any, expected: Any, **options: Any) -> Any:
        checked.append((tuple(tokens.shape), options["device"]))
        return check(path, tokens, expected, **options)

    monkeypatch.setattr(finetuning, "has_room_dense", lambda *_: False)
    monkeypatch.setattr(finetuning, "check_written_model", watched)
    assert run(place, "small").agreement.relative < 1e-5
    assert checked == [((1, 32), CPU)]


def test_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 10, bias=False))
    quantize_model(model, "nf4", target_modules=["0"])
    assert has_room_dense(model, CPU)
    dense = 4 * (1000 * 1000 + 1000 * 10)
    properties = type("", (), {"total_memory": 10 * dense})
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: properties)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _: dense)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    for free, fraction, expected in ((2.0, 1.0, True), (1.05, 1.0, False), (2.0, 0.2, False)):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda _, f=free: (int(f * dense), 0))
        # The real one takes a device with an index only.
        monkeypatch.setattr(
            "torch.cuda.get_per_process_memory_fraction", lambda d, f=fraction: {0: f}[d.index]
        )
        assert has_room_dense(model, torch.device("cuda")) is expected


@pytest.mark.parametrize("base", [None, "nf4"])
@pytest.mark.parametrize("format", FORMATS)
def test_merging_into_quantised_layers(format: str, base: str | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(2)))
    if base is not None:
        quantize_model(model, base, target_modules=["0", "1"])
    apply_prodial(model, ProdialConfig(r=2, target_modules=("0", "1")))
    randomise_adapters(model)
    x = torch.randn(5, 64)
    trained = model(x)
    wanted = {str(i): copy.deepcopy(model[i]).to_quantized(format) for i in range(2)}
    report = merge_quantized(model, format)
    assert report.errors == {name: error for name, (_, error) in wanted.items()}
    assert report.bytes_before == 2 * 4 * 64 * 64
    assert report.bytes_after == sum(layer.packed_bytes for layer in quantised(model))
    for name, (layer, _) in wanted.items():
        assert torch.equal(model.get_submodule(name).dequantize(), layer.dequantize())
    assert not any(isinstance(module, ProdialLinear) for module in model.modules())
    lost = float(((model(x) - trained).norm() / trained.norm()).detach())
    assert 0 < lost < 0.3
    with pytest.raises(ValueError, match="has no ProDiaL adapter"):
        merge_quantized(model, format)
    with pytest.raises(ValueError, match="format must be one of"):
        merge_quantized(model, "int4")
