"""Saved adapters: exact round trips, every refusal, and the base model's fingerprint."""

from __future__ import annotations

import copy
import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from prodial_kernels import (
    ProdialConfig,
    ProdialLinear,
    apply_prodial,
    load_adapter,
    merge_prodial,
    remove_prodial,
    save_adapter,
)
from prodial_kernels.checkpoint import AdapterError, model_fingerprint, read_adapter
from prodial_kernels.checkpoint.files import CONFIG_FILE, TENSOR_FILE, read_files, write_files

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONFIG = ProdialConfig(r=4, n_blocks={"in_proj": 4, "out_proj": 24}, modules_to_save=("head",))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(12, 48, bias=False)
        self.out_proj = nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(value * torch.sigmoid(gate))


class Model(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList([Mixer(), Mixer()])
        self.head = nn.Sequential(nn.Linear(12, 3), nn.BatchNorm1d(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def trained(config: ProdialConfig = CONFIG, seed: int = 1, model: nn.Module | None = None) -> Any:
    """An adapted model whose every trained value moved, as after training."""
    model = Model() if model is None else model
    apply_prodial(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def state(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Everything of a model that loading could change, down to the bits and flags."""
    described: dict[str, tuple[Any, ...]] = {
        name: (type(module), module.training) for name, module in model.named_modules()
    }
    for name, parameter in model.named_parameters():
        described[name] = (parameter.requires_grad, parameter.dtype, parameter.tolist())
    for name, buffer in model.named_buffers():
        described[name] = (buffer.dtype, buffer.tolist())
    return described


def rewrite(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the configuration file and keep its checksum right, as another program might."""
    header, payload = read_files(directory)
    change(header)
    write_files(directory, header, payload)


def rewrite_tensors(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors, and the list of them, and every checksum."""
    header, _ = read_files(directory)
    tensors = load_file(directory / TENSOR_FILE)
    change(tensors)
    header["tensors"] = {
        name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
        for name, t in tensors.items()
    }
    write_files(directory, header, save(tensors))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_adapter(trained(), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        ProdialConfig(r=0, block_size=6, diagonal="free"),
        ProdialConfig(r=2, lora_alpha=7.5, lora_dropout=0.25, train_diagonal=False),
        ProdialConfig(r=1, target_modules=r"layers\.1\..*_proj", train_scale=False,
                      allow_partial=True, block_size=12),
    ],
    ids=["blocks", "no-lora", "no-diagonal", "regex"],
)  # fmt: skip
def test_round_trip_is_exact(tmp_path: Path, config: ProdialConfig) -> None:
    source = trained(config)
    save_adapter(source, tmp_path)
    plain = Model()
    report = load_adapter(plain, tmp_path)
    assert state(plain) == state(source)
    assert report.trainable == sum(p.numel() for p in source.parameters() if p.requires_grad)
    x = torch.randn(5, 12)
    assert torch.equal(plain.eval()(x), source.eval()(x))
    # And again into the adapted model, over other values.
    other = trained(config, seed=2).eval()
    load_adapter(other, tmp_path)
    assert state(other) == state(source)


def test_files_hold_what_the_format_says(directory: Path) -> None:
    assert sorted(p.name for p in directory.iterdir()) == [CONFIG_FILE, TENSOR_FILE]
    tensors = load_file(directory / TENSOR_FILE)
    parts = ("prodial_a", "prodial_b", "prodial_blocks", "prodial_scale")
    assert sorted(tensors) == sorted(
        [f"layers.{i}.{proj}.{part}" for i in range(2) for proj in ("in_proj", "out_proj")
         for part in parts]
        + [f"head.0.{name}" for name in ("bias", "weight")]
        + [f"head.1.{name}" for name in ("bias", "num_batches_tracked", "running_mean",
                                         "running_var", "weight")]
    )  # fmt: skip
    header = json.loads((directory / CONFIG_FILE).read_text())
    assert header["format_version"] == 1
    assert ProdialConfig.from_dict(header["config"]) == CONFIG
    assert header["tensors"]["layers.0.in_proj.prodial_blocks"] == {
        "shape": [4, 3, 3], "dtype": "float32",
    }  # fmt: skip
    assert list(header["base"]["layers"]) == [
        f"layers.{i}.{proj}" for i in range(2) for proj in ("in_proj", "out_proj")
    ]


def test_read_adapter_needs_no_model(tmp_path: Path) -> None:
    model = trained()
    save_adapter(model, tmp_path, base_model="somewhere/mamba")
    saved = read_adapter(str(tmp_path))
    assert saved.config == CONFIG
    assert saved.base_model == "somewhere/mamba"
    name = "layers.1.out_proj.prodial_b"
    assert torch.equal(saved.tensors[name], model.get_parameter(name))


def test_the_models_own_name_is_the_default_base_model(tmp_path: Path) -> None:
    model = trained()
    model.name_or_path = "state-spaces/mamba-130m-hf"
    save_adapter(model, tmp_path)
    assert read_adapter(tmp_path).base_model == "state-spaces/mamba-130m-hf"


def test_masters_keep_their_dtype_in_a_16_bit_model(tmp_path: Path) -> None:
    source = trained(model=Model().to(torch.bfloat16))
    save_adapter(source, tmp_path)
    tensors = load_file(tmp_path / TENSOR_FILE)
    assert tensors["layers.0.in_proj.prodial_scale"].dtype == torch.float32
    assert tensors["head.0.weight"].dtype == torch.bfloat16
    plain = Model().to(torch.bfloat16)
    load_adapter(plain, tmp_path)
    assert state(plain) == state(source)


def test_fp64_adapters_are_not_narrowed(tmp_path: Path) -> None:
    save_adapter(trained(model=Model().double()), tmp_path)
    double = Model().double()
    load_adapter(double, tmp_path)
    plain = Model()
    with pytest.raises(AdapterError, match=r"float32 or narrower, got torch\.float64"):
        load_adapter(plain, tmp_path)
    assert state(plain) == state(Model())


def test_shared_layers_are_saved_once(tmp_path: Path) -> None:
    def shared() -> nn.Module:
        model = Model()
        model.layers.append(model.layers[0])
        return model

    source = trained(model=shared())
    save_adapter(source, tmp_path)
    assert not any(name.startswith("layers.2") for name in load_file(tmp_path / TENSOR_FILE))
    plain = shared()
    load_adapter(plain, tmp_path)
    x = torch.randn(5, 12)
    assert torch.equal(plain(x), source(x))


def test_tied_tensors_are_saved(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = Model()
        model.head[1] = nn.Linear(12, 3)
        model.head[1].weight = model.head[0].weight
        return model

    source = trained(model=tied())
    save_adapter(source, tmp_path)
    plain = tied()
    load_adapter(plain, tmp_path)
    assert state(plain) == state(source)


def test_saving_replaces_what_was_there(directory: Path) -> None:
    second = trained(seed=2)
    save_adapter(second, directory)
    plain = Model()
    load_adapter(plain, directory)
    assert state(plain) == state(second)
    assert len(list(directory.iterdir())) == 2


def test_a_loaded_adapter_can_be_saved_removed_and_merged(directory: Path, tmp_path: Path) -> None:
    plain = Model()
    load_adapter(plain, directory)
    save_adapter(plain, tmp_path / "again")
    again, first = tmp_path / "again" / TENSOR_FILE, directory / TENSOR_FILE
    assert again.read_bytes() == first.read_bytes()
    x = torch.randn(5, 12)
    expected = plain.eval()(x)
    torch.testing.assert_close(merge_prodial(copy.deepcopy(plain))(x), expected)
    removed = remove_prodial(plain)
    assert not any(isinstance(module, ProdialLinear) for module in removed.modules())


def test_impl_may_differ(directory: Path) -> None:
    config = ProdialConfig(**{**CONFIG.to_dict(), "impl": "reference"})
    load_adapter(trained(config), directory)


# --- Refusals: the message says what and where, and the model is untouched. ---------------------


def expect_refusal(directory: Path, match: str, model: nn.Module | None = None) -> None:
    for target in [Model(), trained(seed=3)] if model is None else [model]:
        before = state(target)
        with pytest.raises(AdapterError, match=match):
            load_adapter(target, directory)
        assert state(target) == before


def test_missing_directory_and_files(directory: Path, tmp_path: Path) -> None:
    expect_refusal(tmp_path / "nowhere", "nowhere: no such directory")
    (tmp_path / "empty").mkdir()
    expect_refusal(tmp_path / "empty", "adapter_config.json is missing")
    (directory / TENSOR_FILE).unlink()
    expect_refusal(directory, r"adapter_model\.safetensors is missing, but adapter_config")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_tensors(directory: Path, keep: int) -> None:
    path = directory / TENSOR_FILE
    path.write_bytes(path.read_bytes()[:keep])
    expect_refusal(directory, r"adapter_model\.safetensors is damaged .*its SHA-256 is not")


def test_tampered_tensors(directory: Path) -> None:
    path = directory / TENSOR_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    expect_refusal(directory, "its SHA-256 is not")


def test_tensors_of_another_adapter(directory: Path, tmp_path: Path) -> None:
    save_adapter(trained(seed=2), tmp_path / "other")
    (directory / TENSOR_FILE).write_bytes((tmp_path / "other" / TENSOR_FILE).read_bytes())
    expect_refusal(directory, "belongs to another adapter_config.json")


@pytest.mark.parametrize("keep", [0, 1, 200, -3])
def test_truncated_configuration(directory: Path, keep: int) -> None:
    path = directory / CONFIG_FILE
    path.write_bytes(path.read_bytes()[:keep])
    expect_refusal(directory, "adapter_config.json is not valid JSON")


def test_configuration_that_is_not_utf8(directory: Path) -> None:
    (directory / CONFIG_FILE).write_bytes(b"\xff\xfe\x00{")
    expect_refusal(directory, "adapter_config.json is not valid JSON")


def test_hand_edited_configuration(directory: Path) -> None:
    path = directory / CONFIG_FILE
    path.write_text(path.read_text().replace('"lora_alpha": 4.0', '"lora_alpha": 8.0'))
    expect_refusal(directory, "was changed after it was saved")


def test_configuration_of_another_program(directory: Path) -> None:
    path = directory / CONFIG_FILE
    path.write_text('{"peft_type": "LORA", "r": 8}')
    expect_refusal(directory, "no format_version: it is PEFT's, for LORA")
    path.write_text("[1, 2]")
    expect_refusal(directory, "no format_version: it is not ProDiaL's")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_unknown_format_version(directory: Path, version: object) -> None:
    path = directory / CONFIG_FILE
    content = {**json.loads(path.read_text()), "format_version": version}
    path.write_text(json.dumps({**content, "package_version": "9.9"}))
    expect_refusal(directory, f"format_version={version!r}, written by prodial-kernels 9.9")


def test_missing_and_unknown_fields(directory: Path) -> None:
    rewrite(directory, lambda header: header.pop("base"))
    expect_refusal(directory, r"KeyError: 'base'")


def test_unknown_configuration_option(directory: Path) -> None:
    rewrite(directory, lambda header: header["config"].update(colour="blue"))
    expect_refusal(directory, r"unknown configuration keys \['colour'\]")


def test_tensor_list_that_does_not_match_the_file(directory: Path) -> None:
    rewrite(directory, lambda header: header["tensors"].pop("head.0.bias"))
    expect_refusal(directory, "holds head.0.bias as .* lists it as missing")


def test_payload_that_is_no_safetensors(directory: Path) -> None:
    header, _ = read_files(directory)
    write_files(directory, header, b"not tensors at all")
    expect_refusal(directory, "SafetensorError")


def test_missing_and_extra_keys(directory: Path) -> None:
    name = "layers.1.in_proj.prodial_scale"
    rewrite_tensors(directory, lambda tensors: tensors.update(stranger=tensors.pop(name)))
    expect_refusal(directory, rf"missing \['{name}'\], not in the model \['stranger'\]")


def test_wrong_shape(directory: Path) -> None:
    name = "layers.1.in_proj.prodial_scale"
    rewrite_tensors(directory, lambda tensors: tensors.update({name: torch.ones(47)}))
    expect_refusal(directory, rf"{name} must have shape \[48\], got \[47\]")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_wrong_dtype(directory: Path, dtype: torch.dtype) -> None:
    name = "layers.1.in_proj.prodial_scale"
    rewrite_tensors(directory, lambda tensors: tensors.update({name: torch.ones(48, dtype=dtype)}))
    expect_refusal(directory, rf"{name} must have dtype torch.float32 or narrower, got {dtype}")


def test_head_of_another_size(directory: Path) -> None:
    model = Model()
    model.head[0] = nn.Linear(12, 4)
    expect_refusal(directory, r"head.0.* must have shape \[4", model)


def test_no_adapter_in_the_model(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="this Model has no ProDiaL adapter"):
        save_adapter(Model(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_layers_placed_by_hand_have_no_configuration(directory: Path) -> None:
    model = Model()
    model.layers[0].in_proj = ProdialLinear.from_linear(model.layers[0].in_proj)
    expect_refusal(directory, "this Model has no ProDiaL adapter", model)


def test_another_configuration(directory: Path) -> None:
    config = ProdialConfig(**{**CONFIG.to_dict(), "r": 2, "lora_alpha": 4.0})
    expect_refusal(directory, r"r=4 \(the model has 2\); call remove_prodial", trained(config))


def test_merged_layers(directory: Path) -> None:
    model = trained()
    model.layers[0].in_proj.merge()
    expect_refusal(directory, "merged; call unmerge", model)


def test_target_that_the_model_has_not(directory: Path) -> None:
    expect_refusal(
        directory, "does not fit this model: .*matches nothing", nn.Sequential(nn.Linear(3, 3))
    )


def test_other_layers_than_the_adapters(directory: Path) -> None:
    model = Model()
    model.layers.append(Mixer())
    expect_refusal(directory, r"has nothing for layers\.2\.in_proj, layers\.2\.out_proj", model)
    fewer = Model()
    del fewer.layers[1]
    expect_refusal(directory, r"it adapts layers\.1\.in_proj, which is no target here", fewer)


def test_other_shapes(directory: Path) -> None:
    model = Model()
    model.layers[1].in_proj = nn.Linear(12, 36, bias=False)
    expect_refusal(
        directory, r"layers\.1\.in_proj must have shape .*\[48, 12\], got \[36, 12\]", model
    )


def test_meta_device(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"layers\.0\.in_proj is on the meta device"):
        load_adapter(Model().to("meta"), directory)
    with pytest.raises(AdapterError, match=r"prodial_blocks is on the meta device"):
        save_adapter(trained().to("meta"), tmp_path / "new")


def test_base_that_is_not_finite(tmp_path: Path) -> None:
    model = trained()
    model.layers[1].out_proj.base_layer.weight[:] = float("nan")
    with pytest.raises(AdapterError, match=r"base weight of layers\.1\.out_proj is not finite"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_failure_while_copying_undoes_the_application(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*args: object, **kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr("prodial_kernels.checkpoint.adapter._copy_into", out_of_memory)
    model = Model()
    with pytest.raises(MemoryError):
        load_adapter(model, directory)
    assert state(model) == state(Model())


def test_full_disk_keeps_the_old_adapter(directory: Path) -> None:
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = trained(seed=2)
    for limit in (0, 1000, len(before[TENSOR_FILE]) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                save_adapter(model, directory)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    load_adapter(Model(), directory)


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_adapter(trained(), tmp_path / "file" / "adapter")


# --- The base model's fingerprint. --------------------------------------------------------------


@pytest.mark.parametrize("loaded", DTYPES, ids=str)
@pytest.mark.parametrize("saved", DTYPES, ids=str)
def test_the_same_base_in_another_dtype(
    tmp_path: Path, saved: torch.dtype, loaded: torch.dtype
) -> None:
    """Whichever way the two came from the same weights, including through a narrower dtype."""

    def base() -> Model:
        model = Model()
        with torch.no_grad():
            # Down to what fp16 keeps only as multiples of 2^-24, and to zero.
            model.layers[0].in_proj.weight *= torch.logspace(-9, 0, 12)
            model.layers[1].out_proj.weight[::2] = 0.0
        return model

    save_adapter(trained(model=base().to(saved)), tmp_path)
    for through in (torch.float32, saved, loaded):
        load_adapter(base().to(through).to(loaded), tmp_path)


@pytest.mark.parametrize("loaded", DTYPES, ids=str)
@pytest.mark.parametrize("saved", DTYPES, ids=str)
def test_another_or_a_trained_base(tmp_path: Path, saved: torch.dtype, loaded: torch.dtype) -> None:
    source = trained(model=Model().to(saved))
    save_adapter(source, tmp_path)
    expect_refusal(tmp_path, "other weights than this model's: .* in 4 of 4",
                   Model(seed=1).to(loaded))  # fmt: skip

    fine_tuned = Model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in fine_tuned.parameters():
            # A hundred steps of 1e-5 in random directions, on weights of 0.2.
            parameter += 1e-4 * torch.randn(parameter.shape, generator=generator)
    if {saved, loaded} != {torch.bfloat16, torch.float16}:
        # Between those two, an ulp of bf16 is what the same base may differ by.
        expect_refusal(tmp_path, "other weights than this model's", fine_tuned.to(loaded))

    merged = merge_prodial(copy.deepcopy(source)).to(loaded)
    expect_refusal(tmp_path, "not a fine-tuned or merged one", merged)


def test_one_changed_layer_is_named(directory: Path) -> None:
    model = Model()
    with torch.no_grad():
        model.layers[1].in_proj.weight += 1e-6
    expect_refusal(directory, r"in 1 of 4 layers, first in layers\.1\.in_proj", model)


def test_model_fingerprint() -> None:
    assert model_fingerprint(Model()) == model_fingerprint(Model())
    assert model_fingerprint(Model()) != model_fingerprint(Model(seed=1))
    assert model_fingerprint(Model()) != model_fingerprint(Model().to(torch.bfloat16))
    moved = Model()
    moved.head[1].running_mean += 1
    assert model_fingerprint(moved) != model_fingerprint(Model())
    with pytest.raises(AdapterError, match="meta device"):
        model_fingerprint(Model().to("meta"))


def test_checkpoint_never_unpickles(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("unpickled")

    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    monkeypatch.setattr("torch.load", refuse)
    load_adapter(Model(), directory)
    assert "pickle" not in vars(sys.modules["prodial_kernels.checkpoint.adapter"])
