"""Adapters in format 1, as version 0.1.0 wrote them, still load, by the rules of then."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import nn

from prodial_kernels import load_adapter, save_adapter
from prodial_kernels.checkpoint import read_adapter
from prodial_kernels.checkpoint.files import CONFIG_FILE, TENSOR_FILE
from prodial_kernels.files.sha256 import sha256_of_values
from prodial_kernels.training.inspecting import inspect_adapter
from support.saved_adapters import CONFIG, Model, expect_refusal, state, trained

_STRIDE = 2654435761


def write_first_format(
    model: nn.Module, directory: Path, change: Callable[[dict[str, Any]], None] = lambda _: None
) -> None:
    """Write an adapter of ``model`` as version 0.1.0 did: s itself, 16 values of a weight."""
    save_adapter(model, directory)
    saved = read_adapter(directory)
    tensors = {
        name: tensor + 1 if name.endswith("prodial_scale") else tensor
        for name, tensor in saved.tensors.items()
    }
    layers = {}
    for path in saved.base["layers"]:
        weight = model.get_submodule(path).base_layer.weight.detach()
        flat, count = weight.reshape(-1), weight.numel()
        picked = [flat[i * _STRIDE % count].item() for i in range(16)]
        layers[path] = {"shape": list(weight.shape), "samples": picked}
    shapes = {path: layer["shape"] for path, layer in layers.items()}
    structure = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()
    payload = save(tensors)
    content = {
        "format_version": 1,
        "package_version": "0.1.0",
        "base_model": None,
        "config": saved.config.to_dict(),
        "tensors": {
            name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
            for name, t in tensors.items()
        },
        "base": {"structure": structure, "layers": layers},
        "tensors_sha256": hashlib.sha256(payload).hexdigest(),
    }
    change(content)
    (directory / TENSOR_FILE).write_bytes(payload)
    text = json.dumps({**content, "checksum": sha256_of_values(content)})
    (directory / CONFIG_FILE).write_text(text)


def test_the_second_format_named_tensors_as_the_model_does(tmp_path: Path) -> None:
    source = trained(CONFIG)
    save_adapter(source, tmp_path)
    saved = read_adapter(tmp_path)
    payload = save({name: tensor.contiguous() for name, tensor in saved.tensors.items()})
    content = json.loads((tmp_path / CONFIG_FILE).read_text())
    content |= {"format_version": 2, "tensors_sha256": hashlib.sha256(payload).hexdigest()}
    del content["checksum"]
    (tmp_path / TENSOR_FILE).write_bytes(payload)
    text = json.dumps({**content, "checksum": sha256_of_values(content)})
    (tmp_path / CONFIG_FILE).write_text(text)
    assert read_adapter(tmp_path).format_version == 2
    plain = Model()
    load_adapter(plain, tmp_path)
    x = torch.randn(5, 12)
    assert torch.equal(plain.eval()(x), source.eval()(x))


def test_it_loads_and_computes_the_same(tmp_path: Path) -> None:
    source = trained(CONFIG)
    write_first_format(source, tmp_path)
    plain = Model()
    load_adapter(plain, tmp_path)
    x = torch.randn(5, 12)
    torch.testing.assert_close(plain.eval()(x), source.eval()(x))
    for (name, loaded), (_, expected) in zip(
        plain.named_parameters(), source.named_parameters(), strict=True
    ):
        if name.endswith("prodial_scale"):
            # s near 1 had lost some bits of s - 1; nothing more is lost.
            assert torch.equal(loaded, (expected + 1) - 1)
        else:
            assert torch.equal(loaded, expected)
    again = tmp_path / "again"
    save_adapter(plain, again)
    assert read_adapter(again).format_version == 3
    other = Model()
    load_adapter(other, again)
    assert state(other.eval()) == state(plain)


def test_inspection_speaks_of_s_whatever_the_format(tmp_path: Path) -> None:
    source = trained(CONFIG)
    save_adapter(source, tmp_path / "new")
    write_first_format(source, tmp_path / "old")
    old, new = (inspect_adapter(tmp_path / name).layers for name in ("old", "new"))
    for first, second in zip(old, new, strict=True):
        assert first.scale_mean == pytest.approx(second.scale_mean, rel=1e-5)
        assert first.scale_max == pytest.approx(second.scale_max, rel=1e-5)
        assert 0.01 < first.scale_max < 1


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_its_base_in_another_dtype(tmp_path: Path, saved: torch.dtype, loaded: torch.dtype) -> None:
    write_first_format(trained(model=Model().to(saved)), tmp_path)
    for through in (torch.float32, saved, loaded):
        load_adapter(Model().to(through).to(loaded), tmp_path)
    expect_refusal(tmp_path, "other weights .* 4 of 4 layers", Model(seed=1).to(loaded))


def test_tiny_weights_are_told_apart(tmp_path: Path) -> None:
    def tiny(seed: int) -> Model:
        model = Model(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1e-8)
        return model

    write_first_format(trained(model=tiny(0)), tmp_path)
    load_adapter(tiny(0), tmp_path)
    expect_refusal(tmp_path, "other weights", tiny(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda base: base["layers"].clear(), "contradicts itself"),
        (lambda base: base["layers"].popitem(), "contradicts itself"),
        (lambda base: base.update(structure="0" * 64), "contradicts itself"),
        (lambda base: base.pop("structure"), "cannot be read .KeyError"),
        (lambda base: base["layers"]["layers.0.in_proj"].pop("shape"), "cannot be read .KeyError"),
        *(
            (lambda base, v=v: base["layers"]["layers.0.in_proj"].update(samples=v), "adapter")
            for v in (
                [],
                None,
                "abc",
                [[1], [2, 3]],
                [10**400] * 16,
                [1.0],
                {},
                [None] * 16,
            )
        ),
    ],
)
def test_a_malformed_base_is_refused(
    tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    write_first_format(trained(CONFIG), tmp_path, lambda content: change(content["base"]) or None)
    expect_refusal(tmp_path, message)
