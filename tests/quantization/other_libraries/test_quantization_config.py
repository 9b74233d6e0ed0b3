"""Our formats as transformers' ``quantization_config``: loaded by layers, saved, trained on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from prodial_kernels import (
    ProdialConfig,
    QuantizedLinear,
    apply_prodial,
    load_adapter,
    load_quantized,
    merge_prodial,
    quantize_model,
    remove_prodial,
    save_adapter,
)
from prodial_kernels.embedded import embedded_model_path
from prodial_kernels.models.loading.load import load_model
from prodial_kernels.quantization import FORMATS, TensorFiles
from prodial_kernels.quantization.transformers import ProdialQuantConfig
from support.models import build, randomise_adapters, token_ids

IDS = token_ids()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def quantised_layers(model: Any) -> dict[str, QuantizedLinear]:
    return {p: m for p, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def loaded(directory: Path, format: str | None = None, **options: Any) -> Any:
    config = {} if format is None else {"quantization_config": ProdialQuantConfig(format)}
    return AutoModelForCausalLM.from_pretrained(directory, **config, **options)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense")
    build("mamba2").save_pretrained(directory)
    return directory


@pytest.mark.parametrize("format", FORMATS)
def test_it_equals_quantising_afterwards_and_comes_back(
    format: str, dense: Path, tmp_path: Path
) -> None:
    expected = AutoModelForCausalLM.from_pretrained(dense)
    quantize_model(expected, format)
    model = loaded(dense, format)
    assert quantised_layers(model).keys() == quantised_layers(expected).keys()
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path / "first")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not any(info.values())
    assert {m.FORMAT for m in quantised_layers(again).values()} == {format}
    assert torch.equal(logits(again), logits(expected))
    # And once more, from what was read quantised; in several files.
    again.save_pretrained(tmp_path / "second", max_shard_size="4KB")
    assert len(list((tmp_path / "second").glob("*.safetensors"))) > 2
    assert torch.equal(logits(loaded(tmp_path / "second")), logits(expected))
    stored = json.loads((tmp_path / "second" / "config.json").read_text())["quantization_config"]
    assert stored == {
        "quant_method": "prodial", "format": format, "target_modules": ["in_proj", "out_proj"],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["bamba", "nemotron_h", "falcon_h1"])
def test_families_whose_checkpoints_have_other_names(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "dense")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    quantize_model(expected, "int8")
    model = loaded(tmp_path / "dense", "int8")
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded(tmp_path / "saved")), logits(expected))


def test_the_dense_model_never_exists(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a weight is quantised, every other target is on the meta device or quantised."""
    from prodial_kernels.quantization import transformers

    models: list[Any] = []
    find = transformers.find_layers

    def remembered(model: Any, names: Any) -> Any:
        models.append(model)
        return find(model, names)

    def watched(linear: Any, format: str) -> QuantizedLinear:
        (model,) = models
        for path, module in model.named_modules():
            if path.endswith(("in_proj", "out_proj")) and not isinstance(module, QuantizedLinear):
                assert module.weight.is_meta, path
        return original(linear, format)

    original = transformers.quantize_linear
    monkeypatch.setattr(transformers, "find_layers", remembered)
    monkeypatch.setattr(transformers, "quantize_linear", watched)
    assert len(quantised_layers(loaded(dense, "nf4"))) == 4


def test_dtypes(dense: Path, tmp_path: Path) -> None:
    model = loaded(dense, "nf4", dtype=torch.bfloat16)
    assert {m.dtype for m in quantised_layers(model).values()} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path, dtype=torch.float16)
    assert {m.dtype for m in quantised_layers(again).values()} == {torch.float16}
    assert again.backbone.norm_f.weight.dtype == torch.float16
    assert loaded(tmp_path).dtype == torch.bfloat16


def test_it_is_adapted_trained_resumed_and_merged(dense: Path, tmp_path: Path) -> None:
    model = loaded(dense, "nf4")
    config = ProdialConfig(r=2)
    apply_prodial(model, config)
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    options = {
        "output_dir": str(tmp_path / "run"), "max_steps": 2, "save_steps": 1, "report_to": "none",
        "learning_rate": 1e-2, "use_cpu": True, "per_device_train_batch_size": 1,
        "logging_nan_inf_filter": False, "disable_tqdm": True,
    }  # fmt: skip
    Trainer(model=model, args=TrainingArguments(**options), train_dataset=rows).train()
    trained = logits(model)
    # A checkpoint of an adapted model is the trained model, dense, for everybody.
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert not quantised_layers(saved)
    assert not hasattr(saved.config, "quantization_config")
    torch.testing.assert_close(logits(saved), trained, rtol=1e-4, atol=1e-5)
    # And what a trainer resumes from.
    other = loaded(dense, "nf4")
    apply_prodial(other, config)
    trainer = Trainer(model=other, args=TrainingArguments(**options), train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert torch.equal(logits(other), trained)

    save_adapter(model, tmp_path / "adapter")
    remove_prodial(model)
    load_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(model), trained)
    # The same adapter on the same weights, quantised in memory.
    by_hand = AutoModelForCausalLM.from_pretrained(dense)
    quantize_model(by_hand, "nf4")
    load_adapter(by_hand, tmp_path / "adapter")
    assert torch.equal(logits(by_hand), trained)

    merge_prodial(model)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-5)


def test_pefts_method_takes_it(dense: Path) -> None:
    from peft import get_peft_model

    from prodial_kernels.peft import ProdialPeftConfig

    model = loaded(dense, "int8")
    expected = logits(model)
    model = get_peft_model(model, ProdialPeftConfig(r=2))
    assert torch.equal(logits(model), expected)
    randomise_adapters(model)
    trained = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-5)
    assert not hasattr(merged.config, "quantization_config")


def test_dequantize(dense: Path) -> None:
    model = loaded(dense, "fp8")
    expected = logits(model)
    model.dequantize()
    assert not quantised_layers(model)
    assert torch.equal(logits(model), expected)
    assert not hasattr(model.config, "quantization_config")


def test_the_command_line_and_load_quantized_read_what_was_saved(tmp_path: Path) -> None:
    source = embedded_model_path()
    model = loaded(source, "int8")
    model.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, tmp_path)
    found = load_model(str(tmp_path), device=torch.device("cpu"), dtype=torch.float32).model
    assert len(quantised_layers(found)) == 16
    assert torch.equal(logits(found), logits(model))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    load_quantized(empty, TensorFiles(tmp_path), device="cpu")
    assert torch.equal(logits(empty), logits(model))


PLAIN = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


def test_without_this_package_it_fails_and_is_not_read_as_weights(
    dense: Path, tmp_path: Path
) -> None:
    # Whose codes have as many values as the weight.
    loaded(dense, "int8").save_pretrained(tmp_path)
    command = [sys.executable, "-c", PLAIN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "size" in done.stderr
    assert "Unknown quantization type, got prodial" in done.stderr


# --- What is refused. ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"format": "fp4"}, ValueError, "format must be one of"),
        ({"target_modules": []}, ValueError, "at least one layer"),
        ({"target_modules": "all"}, ValueError, "load_quantized"),
        ({"target_modules": [1]}, TypeError, "list of names"),
        ({"quant_method": "bitsandbytes"}, ValueError, "quant_method must be 'prodial'"),
        ({"bits": 4}, TypeError, "bits"),
    ],
)
def test_refused_configurations(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ProdialQuantConfig(**options)


def test_refused_models(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'q_proj' matches no module"):
        AutoModelForCausalLM.from_pretrained(
            dense, quantization_config=ProdialQuantConfig("nf4", ["q_proj"])
        )
    # transformers divides Mamba's out_proj after loading it; Nemotron-H, above, it does not.
    shutil.copytree(dense, tmp_path / "rescaled")
    config = tmp_path / "rescaled" / "config.json"
    values = {**json.loads(config.read_text()), "rescale_prenorm_residual": True}
    config.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"rescale_prenorm_residual=True.*quantize_model"):
        loaded(tmp_path / "rescaled", "nf4")


def test_a_checkpoint_without_a_weight_is_refused(dense: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(dense, tmp_path / "part")
    file = tmp_path / "part" / "model.safetensors"
    tensors = load_file(file)
    del tensors["backbone.layers.1.mixer.in_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mixer\.in_proj and 0 other.*not whole"):
        loaded(tmp_path / "part", "nf4")
