"""A model is loaded whole, or refused with the names of what does not fit."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.models.loading.load import ModelError, empty_model, load_model
from prodial_kernels.quantization import quantize_model
from prodial_kernels.training.adapted import load_adapted
from support.models import build
from support.tiny_model import byte_tokenizer, tiny_mamba2, write_tiny_model

CPU = torch.device("cpu")
IN_PROJ = "backbone.layers.1.mixer.in_proj.weight"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def load(folder: Path, quantize: str | None = None) -> Any:
    return load_model(str(folder), device=CPU, dtype=torch.float32, quantize=quantize).model


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def set_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refused(folder: Path, quantize: str | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder, quantize)
    return str(caught.value)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize(
    "name", [IN_PROJ, "backbone.embeddings.weight", "backbone.layers.0.mixer.A_log"]
)
def test_a_missing_tensor_is_named(folder: Path, name: str, quantize: str | None) -> None:
    rewrite(folder, lambda tensors: tensors.pop(name))
    assert name in refused(folder, quantize)


def test_every_caller_refuses(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(IN_PROJ))
    with pytest.raises(ModelError, match=IN_PROJ):
        load_adapted(str(folder))


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_an_unknown_tensor_is_named(folder: Path, quantize: str | None) -> None:
    rewrite(folder, lambda tensors: tensors.update(stray=torch.ones(2)))
    assert "does not know: stray" in refused(folder, quantize)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_tensor_of_another_shape_is_named(folder: Path, quantize: str | None) -> None:
    rewrite(folder, lambda tensors: tensors.update({IN_PROJ: tensors[IN_PROJ][:-1].clone()}))
    message = refused(folder, quantize)
    assert IN_PROJ in message
    assert "mismatched_sizes" not in message


def test_many_tensors_are_folded(folder: Path) -> None:
    set_config(folder, num_hidden_layers=40)
    message = refused(folder)
    assert "backbone.layers.*.mixer.A_log (×38)" in message
    assert len(message) < 700


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_too_few_layers_in_the_configuration(
    folder: Path, layers: int, quantize: str | None
) -> None:
    set_config(folder, num_hidden_layers=layers)
    message = refused(folder, quantize)
    assert "backbone.layers." in message or "matches no module" in message
    if quantize is None:
        assert f"config.json says {layers} layers, and the checkpoint has more" in message


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("kept", [0, 5, 5000])
def test_a_file_that_was_cut_off_is_named(folder: Path, kept: int, quantize: str | None) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    message = refused(folder, quantize)
    assert "model.safetensors is cut off or damaged" in message
    assert "fetch or copy it again" in message


def test_embedding_named_as_in_mamba_ssm(folder: Path) -> None:
    rewrite(
        folder,
        lambda tensors: tensors.update(
            {"backbone.embedding.weight": tensors.pop("backbone.embeddings.weight")}
        ),
    )
    expected = tiny_mamba2().get_input_embeddings().weight
    assert torch.equal(load(folder).get_input_embeddings().weight, expected)


def test_state_dict_of_an_adapted_model_says_what_to_do(folder: Path) -> None:
    model = tiny_mamba2()
    apply_prodial(model, ProdialConfig(r=2))
    tensors = {name: t.clone() for name, t in model.state_dict().items() if "lm_head" not in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = refused(folder)
    assert IN_PROJ.replace("1", "0") in message
    assert "use save_adapter" not in message  # the sentence is for people
    assert "save an adapted model with save_adapter, or call merge_prodial first" in message


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_codes_without_a_scale_are_no_weights(
    folder: Path, quantize: str | None, dtype: torch.dtype
) -> None:
    name = "backbone.layers.0.mixer.conv1d.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    message = refused(folder, quantize)
    assert f"{name} is stored as {str(dtype).removeprefix('torch.')}" in message


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("name", ["A_log", "conv1d.weight", "in_proj.weight"])
def test_integers_are_no_weights(
    folder: Path, quantize: str | None, dtype: torch.dtype, name: str
) -> None:
    name = f"backbone.layers.0.mixer.{name}"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    message = refused(folder, quantize)
    assert name in message
    assert "stored as" in message or "must be floating-point" in message


@pytest.mark.parametrize("format", ["nf4", "int8", "fp8"])
def test_a_quantised_checkpoint_whose_configuration_does_not_say_so(
    folder: Path, format: str
) -> None:
    model = tiny_mamba2()
    quantize_model(model, format)
    tensors = {name: t.clone() for name, t in model.state_dict().items() if "lm_head" not in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "config.json has no quantization_config" in refused(folder)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"quant_method": "gptq", "bits": 5}, "bits=5 (gptq)"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version='gemv' (awq)"),
        ({"quant_method": "torchao"}, "'torchao', whose format is not read"),
        ({"quant_method": "compressed-tensors"}, "format=None (compressed-tensors)"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}},
            },
            "weights.type='int' (compressed-tensors)",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {
                    "group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "block"}}
                },
            },
            "weights.strategy='block'",
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo='NVFP4' (modelopt)"),
        ({"bits": 4}, "None, whose format is not read"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
            "bnb_4bit_quant_type='fp4'",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True, "new_field": 1},
            "new_field=1",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [64, 128], "fmt": "e4m3"},
            r"weight_block_size=[64, 128]",
        ),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "activation_scheme='static'"),
    ],
)
def test_quantised_formats_that_are_not_understood(
    folder: Path, config: dict[str, Any], reason: str
) -> None:
    set_config(folder, quantization_config=config)
    message = refused(folder)
    assert reason in message
    assert "Use the dense checkpoint" in message


@pytest.mark.parametrize(
    ("entry", "whose"),
    [
        ("weight.quant_state.bitsandbytes__fp4", "bitsandbytes' FP4"),
        ("qweight", "GPTQ or AWQ"),
        ("weight_packed", "compressed-tensors"),
        ("W_q", "HQQ"),
    ],
)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_entries_of_other_formats_are_recognised(
    folder: Path, entry: str, whose: str, quantize: str | None
) -> None:
    path = IN_PROJ.removesuffix(".weight")
    rewrite(folder, lambda tensors: tensors.update({f"{path}.{entry}": torch.ones(2).int()}))
    assert whose in refused(folder, quantize)


def test_a_quantisation_that_is_no_object_is_refused(folder: Path) -> None:
    set_config(folder, quantization_config=["nf4"])
    assert "must be an object of fields, got ['nf4']" in refused(folder)


def test_directory_without_a_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    message = refused(folder)
    assert "its tokenizer is incomplete: there is no tokenizer.json" in message
    # Half of one is not enough either.
    (folder / "vocab.json").write_text(json.dumps({"a": 0}))
    assert "tokenizer.save_pretrained" in refused(folder)
    byte_tokenizer().save_pretrained(folder)
    load(folder)


def test_code_in_a_model_directory_never_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n"
    for module in ("conf", "model", "tok"):
        (folder / f"{module}.py").write_text(
            code + "from transformers import *\nclass X(PretrainedConfig): model_type = 'x'\n"
        )
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code + "def generate(model): pass\n")
    auto = {"AutoConfig": "conf.X", "AutoModelForCausalLM": "model.X"}
    for model_type in ("x", "mamba2"):
        set_config(folder, auto_map=auto, model_type=model_type)
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        tokenizer |= {"auto_map": {"AutoTokenizer": ["tok.X", None]}, "tokenizer_class": "X"}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        for attempt in (load, lambda f: load(f, "nf4"), _empty):
            monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
            with contextlib.suppress(ModelError):
                attempt(folder)
            assert not ran.exists()


def _empty(folder: Path) -> None:
    empty_model(str(folder), dtype=torch.float32)


def test_tied_and_untied_heads_load(folder: Path, tmp_path: Path) -> None:
    """What transformers itself leaves out of a file is not missing."""
    model = tiny_mamba2()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    for quantize in (None, "nf4"):
        model.save_pretrained(folder)
        loaded = load(folder, quantize)
        inputs, outputs = loaded.get_input_embeddings(), loaded.get_output_embeddings()
        assert inputs.weight is outputs.weight


def test_rescaled_weights_are_those_that_python_sees(folder: Path, tmp_path: Path) -> None:
    """transformers divides out_proj by the root of the number of layers at every load."""
    set_config(folder, rescale_prenorm_residual=True)
    expected = AutoModelForCausalLM.from_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    name = "backbone.layers.0.mixer.out_proj.weight"
    torch.testing.assert_close(expected.get_parameter(name), stored[name] / 2**0.5)
    with pytest.warns(UserWarning, match=r"sets rescale_prenorm_residual.*divides every out_proj"):
        model = load(folder)
    for other, parameter in expected.named_parameters():
        assert torch.equal(parameter, model.get_parameter(other)), other
    # What is made of it is not divided again.
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again.get_parameter(name), model.get_parameter(name))
    # Quantised while it is read: what is quantised is what loading gives.
    with pytest.warns(UserWarning, match="divides every out_proj"):
        quantised = load(folder, "nf4").state_dict()
    byte_tokenizer().save_pretrained(tmp_path / "again")
    for other, tensor in load(tmp_path / "again", "nf4").state_dict().items():
        assert torch.equal(tensor, quantised[other]), other


def test_experts_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    """Several tensors of a file become one of the model: too few, or one of another shape."""
    build("jamba").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    name = "model.layers.1.feed_forward.experts.0.down_proj.weight"
    kept = load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, lambda tensors: tensors.pop(name))
    assert "layers.1.feed_forward.experts.down_proj has shape [1, " in refused(tmp_path)
    kept[name] = kept[name][:-1].clone()
    rewrite(tmp_path, lambda tensors: tensors.update(kept))
    message = refused(tmp_path)
    assert "layers.1.feed_forward.experts.0.down_proj" in message or "experts.down_proj" in message
    assert "do not fit together" in message
    assert "above report" not in message
