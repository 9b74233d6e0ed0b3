"""Layers of GPTQ, AWQ, compressed-tensors and HQQ: read exactly, adapted, or refused by name.

gptqmodel wants a newer torch than is tested with, and hqq and AutoAWQ are built when they are
installed, so none is a dependency of the tests: layers are stand-ins that hold what these classes
hold (gptqmodel 7.7.0, AutoAWQ 0.2.9, hqq 0.2.8, compressed-tensors 0.20.1), packed bit by bit in
``support/stored/grouped_weights.py``. Where a library is installed, its own packing is compared
too.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import ProdialConfig, apply_prodial, merge_prodial
from prodial_kernels.quantization import QuantizedLinear
from prodial_kernels.quantization.foreign import from_foreign, is_foreign
from prodial_kernels.quantization.groups.layer import GroupedLinear
from prodial_kernels.quantization.groups.layouts import (
    from_awq,
    from_compressed_tensors,
    from_gptq,
    from_hqq,
)
from support.models import randomise_adapters, token_ids
from support.stored.foreign_bases import check_adapting, with_projectors
from support.stored.grouped_weights import Case, awq, case, compressed, gptq, hqq

F16 = torch.float16


def same(layer: QuantizedLinear, weight: Tensor) -> None:
    assert layer.dtype == weight.dtype
    assert torch.equal(layer.dequantize(), weight)


# --- Layouts. -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("symmetric", "shuffled"), [(True, False), (False, True), (False, False)])
def test_gptq(bits: int, version: int, symmetric: bool, shuffled: bool) -> None:
    of = case(64, 96, bits, symmetric=symmetric, shuffled=shuffled)
    layer = from_gptq(gptq(of, version), bits, version=version)
    same(layer, of.weight())
    assert (layer.zeros is None) == symmetric
    assert (layer.order is None) != shuffled


def test_gptq_without_an_order_and_with_a_smaller_last_group() -> None:
    of = case(32, 80, group=32)
    entries = gptq(of)
    same(from_gptq(entries, 4, version=1), of.weight())
    whole = case(32, 64, group=64)
    entries = {name: tensor for name, tensor in gptq(whole).items() if name != "g_idx"}
    same(from_gptq(entries, 4, version=1), whole.weight())


@pytest.mark.parametrize("group", [32, 96])
def test_awq(group: int) -> None:
    of = case(64, 96, group=group)
    same(from_awq(awq(of)), of.weight())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 96])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compressed_tensors(bits: int, symmetric: bool, group: int, dtype: torch.dtype) -> None:
    of = case(24, 96, bits, group, symmetric=symmetric, dtype=dtype)
    same(from_compressed_tensors(compressed(of, symmetric=symmetric), bits), of.weight())


def test_four_bits_of_compressed_tensors_are_shared() -> None:
    entries = compressed(case(24, 96), symmetric=False)
    layer = from_compressed_tensors(entries, 4)
    assert layer.codes.data_ptr() == entries["weight_packed"].data_ptr()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [F16, torch.bfloat16, torch.float32])
def test_hqq(bits: int, axis: int, dtype: torch.dtype) -> None:
    of = case(48, 64, bits, dtype=dtype)
    of.scales = (torch.rand(48 * 64 // 16) + 0.1).to(dtype)
    zeros = (torch.rand(len(of.scales)) * (1 << bits)).to(dtype)
    packed, meta, weight = hqq(of, zeros, axis, 16)
    same(from_hqq(packed, meta), weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": torch.zeros(7, 64, dtype=torch.int32)}, "qweight must be"),
        ({"qweight": torch.zeros(12, 64, dtype=torch.int64)}, "matrix of int32 words"),
        ({"qzeros": torch.zeros(3, 7, dtype=torch.int32)}, "qzeros"),
        ({"scales": torch.full((3, 64), torch.inf)}, "not finite"),
        ({"g_idx": torch.full((96,), 3, dtype=torch.int32)}, "groups below 3"),
    ],
)
def test_gptq_that_does_not_fit(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_gptq({**gptq(case(64, 96)), **change}, 4, version=1)


def test_awqs_other_layouts_do_not_fit() -> None:
    entries = awq(case(64, 96))
    # gemv packs along the rows.
    with pytest.raises(ValueError, match="other layouts"):
        from_awq({**entries, "qweight": torch.zeros(64, 12, dtype=torch.int32)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_zero": True}, "quantised or on the host"),
        ({"packing": "5bit_u8"}, "packed as '5bit_u8'"),
        ({"shape": torch.Size([96, 32]), "axis": 0}, "do not divide"),
    ],
)
def test_hqq_that_is_not_read(change: dict[str, Any], message: str) -> None:
    of = case(48, 64)
    of.scales = torch.rand(48 * 64 // 64).to(F16)
    packed, meta, _ = hqq(of, torch.rand(48).to(F16), 1, 64)
    with pytest.raises(ValueError, match=message):
        from_hqq(packed, {**meta, **change})


# --- Layers as the libraries leave them in a model. ---------------------------------------------


class BaseQuantLinear(nn.Module):
    """Stands for gptqmodel's."""

    REQUIRES_FORMAT_V2 = True


BaseQuantLinear.__module__ = "gptqmodel.nn_modules.qlinear"


def gptqmodels(of: Case, name: str = "TorchLinear", bias: Tensor | None = None) -> nn.Module:
    layer: Any = type(name, (BaseQuantLinear,), {})()
    layer.in_features, layer.out_features, layer.bits = of.codes.shape[1], len(of.codes), of.bits
    entries = awq(of) if name.startswith("Awq") else gptq(of, 2)
    for entry, tensor in {**entries, "bias": bias}.items():
        layer.register_buffer(entry, tensor)
    return layer


def hqqs(of: Case, bias: Tensor | None = None) -> nn.Module:
    n, k = of.codes.shape
    groups = of.scales.numel()
    packed, meta, _ = hqq(of, torch.rand(groups).to(of.scales.dtype) * 15, 1, n * k // groups)
    layer: Any = type("HQQLinear", (nn.Module,), {"__module__": "hqq.core.quantize"})()
    layer.W_q = nn.Parameter(packed, requires_grad=False)
    layer.meta, layer.bias, layer.ready = meta, bias, True
    layer.compute_dtype = of.scales.dtype
    return layer


def compressed_linear(
    of: Case, bias: Tensor | None = None, symmetric: bool = False
) -> nn.Linear:  # fmt: skip
    layer: Any = nn.Linear(*reversed(of.codes.shape), bias=bias is not None)
    return as_compressed(layer, compressed(of, symmetric=symmetric), bias, num_bits=of.bits)


def as_compressed(
    layer: Any, entries: dict[str, Tensor], bias: Tensor | None, **weights: Any
) -> nn.Linear:
    del layer.weight
    for name, tensor in {**entries, "bias": bias}.items():
        own = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
        layer.register_parameter(name, own)
    scheme = {"type": "int", "strategy": "group", "symmetric": True, **weights}
    layer.quantization_scheme = SimpleNamespace(weights=SimpleNamespace(**scheme))
    layer.quantization_status = SimpleNamespace(value="compressed")
    # As compressed-tensors patches it.
    layer.forward = layer.forward
    return layer


def of_linear(linear: nn.Linear, **options: Any) -> Case:
    n, k = linear.weight.shape
    of = case(n, k, **options)
    of.scales *= 0.02 / of.scales.float().mean()
    return of


@pytest.mark.parametrize("name", ["TorchLinear", "TritonV2Linear", "AwqTorchLinear"])
def test_gptqmodels_layers(name: str) -> None:
    of, bias = case(64, 96), torch.randn(64)
    layer = gptqmodels(of, name, bias)
    assert is_foreign(layer)
    read = from_foreign(layer)
    same(read, of.weight())
    assert read.bias is not None
    assert torch.equal(read.bias, bias)
    same(from_foreign(layer, torch.bfloat16), of.weight(torch.float32).to(torch.bfloat16))


@pytest.mark.parametrize("name", ["MarlinLinear", "ExllamaV2Linear", "AwqMarlinLinear"])
def test_layers_that_were_repacked_are_refused(name: str) -> None:
    model = nn.ModuleDict({"in_proj": gptqmodels(case(64, 96), name)})
    with pytest.raises(ValueError, match=rf"in_proj cannot be .*a {name} has repacked.*gptq_torch"):
        apply_prodial(model, ProdialConfig(r=2, target_modules="in_proj"))


def test_hqq_that_was_prepared_for_a_kernel_is_refused() -> None:
    layer = type(
        "HQQLinearTorchWeightOnlynt4", (nn.Module,), {"__module__": "hqq.backends.torchao"}
    )
    model = nn.ModuleDict({"in_proj": layer()})
    with pytest.raises(ValueError, match="before prepare_for_inference"):
        apply_prodial(model, ProdialConfig(r=2, target_modules="in_proj"))


def test_a_layer_that_has_run_is_refused() -> None:
    layer: Any = nn.Linear(32, 8)
    layer.quantization_scheme = SimpleNamespace(weights=SimpleNamespace(num_bits=4))
    layer.quantization_status = SimpleNamespace(value="decompressed")
    model = nn.ModuleDict({"in_proj": layer})
    with pytest.raises(ValueError, match="load the model again and adapt it before it is called"):
        apply_prodial(model, ProdialConfig(r=2, target_modules="in_proj"))


@pytest.mark.parametrize("rows", [True, False])
def test_eight_bits_of_compressed_tensors(rows: bool) -> None:
    weight = torch.randn(24, 40) * torch.logspace(-2, 1, 24)[:, None]
    scale = weight.abs().amax(1, keepdim=True) if rows else weight.abs().max().reshape(1)
    strategy = "channel" if rows else "tensor"
    for kind, most, codes in (("float", 448, torch.float8_e4m3fn), ("int", 127, torch.int8)):
        own = (scale / most).bfloat16()
        rounded = weight / own.float()
        stored = (rounded.round() if kind == "int" else rounded).clamp(-most, most).to(codes)
        layer = as_compressed(
            nn.Linear(40, 24), {"weight": stored, "weight_scale": own}, None, num_bits=8, type=kind,
            strategy=strategy,
        )  # fmt: skip
        same(from_foreign(layer), (stored.float() * own.float()).bfloat16())
    layer.quantization_scheme.weights.strategy = "block"
    with pytest.raises(ValueError, match="8-bit int with a scale by block is not read"):
        from_foreign(layer)


def test_transformers_fp8_layers_of_compressed_tensors() -> None:
    integration = pytest.importorskip("transformers.integrations.compressed_tensors")
    layer = integration.CompressedTensorsFP8Linear(40, 24, has_bias=True)
    codes = torch.randn(24, 40).to(torch.float8_e4m3fn)
    layer.weight = nn.Parameter(codes, requires_grad=False)
    layer.weight_scale = nn.Parameter(torch.rand(1, 24) + 0.1, requires_grad=False)
    assert is_foreign(layer)
    exact = codes.float() * layer.weight_scale.T
    assert torch.equal(from_foreign(layer, torch.float32).dequantize(), exact)


def quantised_model(library: str) -> Any:
    def replaced(linear: nn.Linear) -> nn.Module:
        bias = None if linear.bias is None else linear.bias.detach()
        # AWQ packs eight rows in a word.
        name = "AwqTorchLinear" if library == "awq" and len(linear.weight) % 8 == 0 else ""
        of = of_linear(linear, group=8, shuffled=library == "gptq", symmetric=library == "gptq")
        if library == "hqq":
            return hqqs(of, bias)
        if library == "compressed-tensors":
            return compressed_linear(of, bias)
        return gptqmodels(of, name or "TorchLinear", bias)

    return with_projectors(replaced)


@pytest.mark.parametrize("library", ["gptq", "awq", "compressed-tensors", "hqq"])
def test_a_model_that_was_quantised(library: str, tmp_path: Path) -> None:
    model = quantised_model(library)
    found = {type(from_foreign(m)) for m in model.modules() if is_foreign(m)}
    assert found == {GroupedLinear}
    check_adapting(model, tmp_path)


@pytest.mark.parametrize("library", ["gptq", "compressed-tensors"])
def test_pefts_method_takes_it(library: str, tmp_path: Path) -> None:
    from peft import PeftModel, get_peft_model

    from prodial_kernels.peft import ProdialPeftConfig

    model, twin = quantised_model(library), quantised_model(library)
    apply_prodial(twin, ProdialConfig(r=2))
    wrapped = get_peft_model(model, ProdialPeftConfig(r=2))
    randomise_adapters(wrapped)
    randomise_adapters(twin)
    trained = wrapped.eval()(input_ids=token_ids(), use_cache=False).logits
    expected = twin.eval()(input_ids=token_ids(), use_cache=False).logits
    torch.testing.assert_close(trained, expected, rtol=1e-6, atol=1e-6)
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantised_model(library), str(tmp_path)).eval()
    assert torch.equal(again(input_ids=token_ids(), use_cache=False).logits, trained)
    merged = again.merge_and_unload()(input_ids=token_ids(), use_cache=False).logits
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-5)


def test_merged_layers_are_ignored_by_compressed_tensors_later() -> None:
    model = quantised_model("compressed-tensors")
    inner = SimpleNamespace(ignore=["lm_head"])
    model.config.quantization_config = SimpleNamespace(quantization_config=inner)
    before = {path for path, module in model.named_modules() if is_foreign(module)}
    apply_prodial(model, ProdialConfig(r=2))
    merge_prodial(model)
    assert before < {*inner.ignore}
    assert inner.ignore[0] == "lm_head"


def test_what_gptqs_configuration_cannot_say_is_said() -> None:
    from transformers import GPTQConfig

    model = quantised_model("gptq")
    model.config.quantization_config = GPTQConfig(bits=4)
    apply_prodial(model, ProdialConfig(r=2))
    with pytest.warns(UserWarning, match="GPTQConfig cannot say which layers are dense"):
        merge_prodial(model)


# --- The libraries themselves, where they are installed. ----------------------------------------


def test_as_compressed_tensors_unpacks_it() -> None:
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    for bits, symmetric in product(range(2, 9), (True, False)):
        of = case(24, 96, bits, symmetric=symmetric, dtype=torch.bfloat16)
        weights = quantization.QuantizationArgs(
            num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=32
        )
        scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
        entries = compressed(of, symmetric=symmetric)
        theirs = base.PackedQuantizationCompressor.decompress(entries, scheme)["weight"]
        same(from_compressed_tensors(entries, bits), theirs)


def test_as_hqq_dequantises_it() -> None:
    quantize = pytest.importorskip("hqq.core.quantize")
    forms = ((64, F16), (None, torch.bfloat16), (32, torch.float32))
    for bits, axis, (group, dtype) in product((8, 4, 3, 2, 1), (0, 1), forms):
        config = quantize.BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
        layer = quantize.HQQLinear(nn.Linear(128, 192), config, compute_dtype=dtype, device="cpu")
        same(from_foreign(layer), layer.dequantize())


def test_as_gptqmodel_dequantises_it() -> None:
    kernel = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch").TorchLinear
    for bits, shuffled in product((2, 3, 4, 8), (True, False)):
        of = case(64, 96, bits, shuffled=shuffled)
        layer = kernel(
            bits=bits, group_size=32, sym=False, desc_act=shuffled, in_features=96, out_features=64
        )
        for name, tensor in gptq(of, 2).items():
            setattr(layer, name, tensor)
        layer.train()
        same(from_foreign(layer), super(kernel, layer).dequantize_weight().t())


def test_as_awq_dequantises_it() -> None:
    packing = pytest.importorskip("awq.utils.packing_utils")
    of = case(64, 96)
    entries = awq(of)
    own = packing.dequantize_gemm(*(entries[n] for n in ("qweight", "qzeros", "scales")), 4, 32)
    same(from_awq(entries), own.t())
