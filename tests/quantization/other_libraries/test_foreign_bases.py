"""Layers that transformers or torchao quantised: read exactly and adapted, or refused by name.

FP8's layers are transformers' own classes, torchao's tensors are torchao's where it is installed.
Of bitsandbytes: ``tests/with_peft`` and ``tests/gpu``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import (
    ProdialConfig,
    apply_prodial,
    merge_prodial,
    quantize_linear,
)
from prodial_kernels.linear import adapted_layers
from prodial_kernels.models.adapt.named_layer import NamedProdialLinear
from prodial_kernels.quantization.foreign import from_foreign, is_foreign
from support.models import token_ids
from support.stored.foreign_bases import CONFIG, check_adapting, with_projectors

# Edges: the last tile smaller, also such that the number of tiles divides the size.
SHAPES = [(256, 128), (300, 257), (192, 256), (130, 64)]


def dense(n: int, k: int, *, bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(n + k)
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    # Tiles and rows of very different sizes: a scale that is taken for another's shows.
    with torch.no_grad():
        linear.weight *= torch.logspace(-2, 2, n)[:, None] * torch.logspace(1, -1, k)
    return linear


def finegrained(linear: nn.Linear, *, scale_fmt: str = "float", **options: Any) -> nn.Linear:
    """transformers' own layer, filled with codes and scales made here."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    n, k = linear.weight.shape
    layer = FP8Linear(
        k, n, **{"block_size": (128, 128), **options}, scale_fmt=scale_fmt,
        has_bias=linear.bias is not None,
    )  # fmt: skip
    stored = quantize_linear(linear, "fp8")
    scales = stored.weight_scale_inv
    if scale_fmt == "ue8m0":
        scales = scales.to(torch.float8_e8m0fnu)
    layer.weight = nn.Parameter(stored.codes, requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(scales, requires_grad=False)
    layer.bias = linear.bias
    return layer


def by_hand(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Element by element: tile (i // 128, j // 128) scales element (i, j)."""
    n, k = codes.shape
    at = (torch.arange(n)[:, None] // 128, torch.arange(k)[None, :] // 128)
    return (codes.double() * scales.double()[at]).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_finegrained_fp8_is_read_exactly(shape: tuple[int, int], scale_fmt: str) -> None:
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    layer = finegrained(dense(*shape), scale_fmt=scale_fmt)
    assert is_foreign(layer)
    read = from_foreign(layer)
    assert read.codes.data_ptr() == layer.weight.data_ptr(), "shared, not copied"
    assert (read.dtype, read.FORMAT) == (torch.bfloat16, "fp8")
    scales = layer.weight_scale_inv.detach().float()
    weight = read.dequantize(dtype=torch.float32)
    assert torch.equal(weight, by_hand(layer.weight, scales, torch.float32))
    theirs = _dequantize_fp8_weight(layer.weight, scales, [128, 128], torch.float32)
    assert torch.equal(weight, theirs)


def test_one_scale_for_all() -> None:
    layer = finegrained(dense(300, 257), block_size=None)
    layer.weight_scale_inv = nn.Parameter(torch.tensor(0.25))
    weight = from_foreign(layer).dequantize(dtype=torch.float32)
    assert torch.equal(weight, layer.weight.float() * 0.25)


def grouped() -> nn.Module:
    from transformers.integrations.finegrained_fp8 import FP8GroupedLinear

    return FP8GroupedLinear(64, 128, 2, block_size=(128, 128))


def changed(name: str, value: Tensor, **options: Any) -> nn.Module:
    layer = finegrained(dense(256, 128), **options)
    setattr(layer, name, nn.Parameter(value, requires_grad=False))
    return layer


REFUSED = {
    "groups": (grouped, "FP8GroupedLinear is called in another way"),
    "fixed input scales": (
        lambda: finegrained(dense(256, 128), activation_scheme="static"), "activation_scheme='dyn"
    ),
    "FP4": (
        lambda: changed("weight", torch.zeros(256, 64, dtype=torch.int8)), "FP4 has no layout here"
    ),
    "dequantised": (
        lambda: changed("weight", torch.zeros(256, 128, dtype=torch.bfloat16)), "loaded again as a"
    ),
    "other tiles": (
        lambda: changed("weight_scale_inv", torch.ones(256, 4)), r"per 128×128 tile"
    ),
    "an unknown encoding": (
        lambda: changed("weight_scale_inv", torch.ones(2, 1, dtype=torch.int32)), "floating point"
    ),
    "not finite": (
        lambda: changed("weight_scale_inv", torch.full((2, 1), float("nan"))), "not finite"
    ),
    "not loaded": (lambda: finegrained(dense(256, 128)).to("meta"), "load its weight first"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    model = nn.ModuleDict({"in_proj": make()})
    layer = model["in_proj"]
    with pytest.raises(ValueError, match=message) as caught:
        apply_prodial(model, ProdialConfig(r=2, target_modules="in_proj"))
    assert str(caught.value).startswith("in_proj cannot be adapted: ")
    assert model["in_proj"] is layer


# --- Whole models. ------------------------------------------------------------------------------


def test_a_model_with_transformers_fp8_layers(tmp_path: Path) -> None:
    check_adapting(with_projectors(finegrained), tmp_path)


def test_it_takes_the_models_dtype_and_inputs_in_any() -> None:
    model = with_projectors(finegrained, torch.bfloat16)
    apply_prodial(model, CONFIG)
    layer = next(iter(adapted_layers(model).values()))
    assert isinstance(layer, NamedProdialLinear)
    assert layer.base_layer.dtype == torch.bfloat16
    assert layer(torch.randn(3, layer.in_features)).dtype == torch.float32
    assert merge_prodial(model)(input_ids=token_ids()).logits.dtype == torch.bfloat16


def test_what_is_merged_is_named_in_the_models_configuration() -> None:
    from transformers import FineGrainedFP8Config

    model = with_projectors(finegrained)
    model.config.quantization_config = FineGrainedFP8Config()
    apply_prodial(model, CONFIG)
    merged = merge_prodial(model)
    listed = merged.config.quantization_config.modules_to_not_convert
    assert {path for path, m in merged.named_modules() if type(m) is nn.Linear} == set(listed)


# --- torchao. -----------------------------------------------------------------------------------


def torchao(linear: nn.Linear, config: str = "Int8WeightOnlyConfig", **options: Any) -> nn.Linear:
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(linear)
    quantization.quantize_(holder, getattr(quantization, config)(**options))
    return holder[0]


def float8(linear: nn.Linear, block: list[int]) -> nn.Linear:
    """torchao's tensor with other blocks than its CPU quantiser makes."""
    quantization = pytest.importorskip("torchao.quantization")
    n, k = linear.weight.shape
    scales = torch.rand(-(-n // block[0]), -(-k // block[1])) + 0.5
    codes = (linear.weight.detach() * 0.1).to(torch.float8_e4m3fn)
    linear.weight = nn.Parameter(
        quantization.Float8Tensor(codes, scales, block_size=block, dtype=linear.weight.dtype),
        requires_grad=False,
    )
    return linear


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao_is_read_exactly(shape: tuple[int, int], config: str) -> None:
    layer = torchao(dense(*shape), config)
    assert is_foreign(layer)
    read = from_foreign(layer)
    assert read.dtype == torch.bfloat16
    assert torch.equal(read.dequantize(), layer.weight.dequantize())
    # And what a state dict of it gives back.
    again = type(read).from_entries(read.entries(), read.bias, read.dtype)
    assert torch.equal(again.dequantize(), read.dequantize())
    target = from_foreign(torchao(dense(*shape, bias=True), config))
    target.load_state_dict(read.state_dict())
    assert torch.equal(target.dequantize(), read.dequantize())


@pytest.mark.parametrize("block", [[128, 128], [256, 256]])
def test_torchaos_tiles(block: list[int]) -> None:
    layer = float8(dense(256, 256, dtype=torch.float32), block)
    assert torch.equal(from_foreign(layer).dequantize(), layer.weight.dequantize())


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_a_model_that_torchao_quantised(config: str, tmp_path: Path) -> None:
    check_adapting(with_projectors(lambda linear: torchao(linear, config)), tmp_path)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("Int8DynamicActivationInt8WeightConfig", {}, "quantises or scales its inputs too"),
        ("IntxWeightOnlyConfig", {}, "no format that is read"),
    ],
)
def test_torchaos_other_formats_are_refused(config: str, options: dict, message: str) -> None:
    model = nn.ModuleDict({"in_proj": torchao(dense(64, 64), config, **options)})
    with pytest.raises(ValueError, match=rf"in_proj cannot be .*{message}.*Int8WeightOnly"):
        apply_prodial(model, ProdialConfig(r=2, target_modules="in_proj"))


def test_torchaos_other_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scale for each \[1, 32\] of \[64, 64\] is not read"):
        from_foreign(float8(dense(64, 64), [1, 32]))
