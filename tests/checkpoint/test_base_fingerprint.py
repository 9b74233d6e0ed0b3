"""The base model's fingerprint: the same weights in any dtype, and no others."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from prodial_kernels import load_adapter, merge_prodial, quantize_model, save_adapter
from prodial_kernels.checkpoint import AdapterError, model_fingerprint, read_adapter
from support.saved_adapters import Model, expect_refusal, rewrite, trained

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    expect_refusal(tmp_path, "other weights than this model's: .* in 6 of 6 tensors",
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
    expect_refusal(directory, r"in 1 of 6 tensors, first in layers\.1\.in_proj\.weight", model)


def test_model_fingerprint() -> None:
    assert model_fingerprint(Model()) == model_fingerprint(Model())
    assert model_fingerprint(Model()) != model_fingerprint(Model(seed=1))
    assert model_fingerprint(Model()) != model_fingerprint(Model().to(torch.bfloat16))
    moved = Model()
    moved.head[1].running_mean += 1
    assert model_fingerprint(moved) != model_fingerprint(Model())
    with pytest.raises(AdapterError, match="meta device"):
        model_fingerprint(Model().to("meta"))


NOISE = (
    "layers.0.in_proj.weight", "layers.1.out_proj.bias", "embedding.weight", "norm.weight",
    "norm.bias", "mask",
)  # fmt: skip


class Whole(Model):
    """With tensors that no adapter touches, of other kinds as well."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.embedding = torch.nn.Embedding(7, 12)
        self.norm = torch.nn.LayerNorm(12)
        self.register_buffer("mask", torch.arange(12))
        self.register_buffer("cache", torch.randn(3), persistent=False)


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NOISE)
def test_every_value_of_every_tensor_counts(
    tmp_path: Path, name: str, saved: torch.dtype, loaded: torch.dtype
) -> None:
    """Also of those that are not adapted, and across dtypes as far as one holds the other's."""
    save_adapter(trained(model=Whole().to(saved)), tmp_path)
    same = Whole().to(loaded)
    same.cache.fill_(7)
    load_adapter(same, tmp_path)
    model = Whole().to(loaded)
    tensor = model.state_dict()[name]
    for index in (0, 1, tensor.numel() - 1):
        before = tensor.clone()
        with torch.no_grad():
            tensor.view(-1)[index] = 5
        expect_refusal(tmp_path, f"in 1 of 10 tensors, first in {name}", model)
        tensor.copy_(before)
    load_adapter(model, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_that_is_not_finite_is_another_base(directory: Path, value: float) -> None:
    model = Model()
    with torch.no_grad():
        model.layers[0].out_proj.bias[3] = value
    with pytest.raises(AdapterError, match=r"first in layers\.0\.out_proj\.bias"):
        load_adapter(model, directory)


def test_tiny_weights_are_told_apart(tmp_path: Path) -> None:
    def tiny(seed: int) -> Model:
        model = Model(seed)
        with torch.no_grad():
            for parameter in model.layers.parameters():
                parameter.mul_(1e-8)
        return model

    save_adapter(trained(model=tiny(0)), tmp_path)
    load_adapter(tiny(0).to(torch.bfloat16), tmp_path)
    expect_refusal(tmp_path, "in 6 of 6 tensors", tiny(1))
    expect_refusal(tmp_path, "in 6 of 6 tensors", tiny(1).to(torch.bfloat16))


def test_what_the_file_says_of_the_base_is_not_left_out(directory: Path) -> None:
    def change(header: dict) -> None:
        header["base"]["layers"].clear()

    rewrite(directory, change)
    expect_refusal(directory, "has nothing for layers.0.in_proj")
    rewrite(directory, lambda header: header["base"]["tensors"].popitem())
    expect_refusal(directory, "has nothing for layers.0.in_proj")


def test_tied_tensors_are_described_under_every_name(tmp_path: Path) -> None:
    def tied(apart: bool = False) -> Model:
        model = Whole()
        model.other = torch.nn.Embedding(7, 12)
        model.other.weight = model.embedding.weight
        if apart:
            model.other.weight = torch.nn.Parameter(model.embedding.weight.detach().clone())
        return model

    save_adapter(trained(model=tied()), tmp_path)
    load_adapter(tied(), tmp_path)
    load_adapter(tied(apart=True), tmp_path)


def test_the_format_of_the_base_is_noted(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path / "dense")
    assert read_adapter(tmp_path / "dense").base_format == "dense"
    model = Model()
    quantize_model(model, "int8", target_modules=("in_proj", "out_proj"))
    save_adapter(trained(model=model), tmp_path / "int8")
    assert read_adapter(tmp_path / "int8").base_format == "int8"
    expect_refusal(tmp_path / "int8", r"stored as int8, and here it is dense: .*--quantize int8",
                   Model())  # fmt: skip
    expect_refusal(tmp_path / "dense", r"stored as dense, and here it is int8: load the model wi",
                   quantised())  # fmt: skip


def quantised() -> Model:
    model = Model()
    quantize_model(model, "int8", target_modules=("in_proj", "out_proj"))
    return model
