"""State-space parameters trained as offsets: gradients on every path, saving, merging, removing."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

from prodial_kernels import (
    ProdialConfig,
    ProdialLinear,
    adapter_disabled,
    adapter_parameter_groups,
    apply_prodial,
    load_adapter,
    merge_prodial,
    remove_prodial,
    save_adapter,
)
from prodial_kernels.checkpoint import AdapterError, read_adapter
from prodial_kernels.models.methods.offsets import ssm_parameters
from prodial_kernels.models.mixers.hf import FUSED_SSD
from prodial_kernels.training.inspecting import inspect_adapter
from support.mixers import cuda_stand_ins
from support.mixers.adapted_families import (
    EffectiveWeight,
    assert_alive_and_equal,
    forbid_reading_the_weight,
    install_mamba_ssm,
    install_stand_in,
)
from support.mixers.adapted_mamba_ssm import MIXERS, adapted
from support.mixers.adapted_mamba_ssm import token_ids as mixer_ids
from support.mixers.toy import Toy
from support.models import FAMILIES, Step, build, randomise_adapters, token_ids, training_step

OFFSET = "prodial_offset_"
CONFIG = ProdialConfig(r=3, lora_alpha=6, diagonal="free", train_ssm="all")
SSD_FAMILIES = [name for name, family in FAMILIES.items() if family.fused == FUSED_SSD]


def adapt(name: str, config: ProdialConfig = CONFIG, **overrides: Any) -> nn.Module:
    model = build(name, **overrides)
    apply_prodial(model, config)
    randomise_adapters(model)
    move(model)
    return model


@torch.no_grad()
def move(model: nn.Module) -> dict[str, torch.Tensor]:
    """Move every offset away from 0; return them by name."""
    generator = torch.Generator().manual_seed(3)
    moved = {n: p for n, p in model.named_parameters() if OFFSET in n}
    for offset in moved.values():
        offset.copy_(torch.randn(offset.shape, generator=generator) * 0.2)
    return moved


def oracle_step(name: str, adapted_model: nn.Module, **overrides: Any) -> Step:
    """The same step on a plain model whose own parameters were moved, and are trained."""
    model = build(name, **overrides).requires_grad_(False)
    for path, layer in adapted_model.named_modules():
        if isinstance(layer, ProdialLinear):
            linear = model.get_submodule(path)
            parametrize.register_parametrization(linear, "weight", EffectiveWeight(layer))
    offsets = {n: p for n, p in adapted_model.named_parameters() if OFFSET in n}
    for offset, value in offsets.items():
        parameter = model.get_parameter(offset.replace(OFFSET, "").replace(".base_layer.", "."))
        parameter.data += value.detach()
        parameter.requires_grad_()
    step = training_step(model, token_ids())
    plain = {o.replace(OFFSET, "").replace(".base_layer.", "."): o for o in offsets}
    renamed = {n.replace("parametrizations.weight.0.", ""): g for n, g in step.gradients.items()}
    return Step(step.logits, {plain.get(n, n): g for n, g in renamed.items()})


@pytest.mark.parametrize("name", FAMILIES)
def test_every_gradient_on_separate_kernels(name: str) -> None:
    model = adapt(name)
    offsets = {n.rpartition(OFFSET)[2] for n, _ in model.named_parameters() if OFFSET in n}
    step_bias = {"mamba": "bias", "falcon_mamba": "bias", "jamba": "bias", "zamba": "dt_proj_bias"}
    assert offsets == {"A_log", "D", "weight", "bias", step_bias.get(name, "dt_bias")}
    assert_alive_and_equal(training_step(model, token_ids()), oracle_step(name, model))


@pytest.mark.parametrize("install", [install_stand_in, install_mamba_ssm])
@pytest.mark.parametrize("name", SSD_FAMILIES)
def test_every_gradient_on_the_fused_path_of_mamba_2(
    name: str, install: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapt(name)
    expected = oracle_step(name, model)
    calls = install(monkeypatch, name)
    forbid_reading_the_weight(monkeypatch)
    assert_alive_and_equal(training_step(model, token_ids()), expected)
    assert len(calls) == sum(hasattr(module, "A_log") for module in model.modules())


@pytest.mark.parametrize("targets", [("in_proj", "out_proj"), ("in_proj", "x_proj", "dt_proj")])
def test_every_gradient_in_the_block_of_mamba_1(
    targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ProdialConfig(
        r=2, lora_alpha=4, diagonal="free", target_modules=targets, train_ssm=("all",)
    )
    model = adapt("mamba", config, time_step_rank=3)
    expected = oracle_step("mamba", model, time_step_rank=3)
    cuda_stand_ins.install(monkeypatch)
    assert_alive_and_equal(training_step(model, token_ids()), expected)
    assert cuda_stand_ins.calls["scan_bwd"] == 2


@pytest.mark.usefixtures("stand_in_kernels")
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_gradient_in_mamba_ssm(mixer: type[nn.Module]) -> None:
    """In fp64, against upstream's own path on the moved parameters themselves."""
    config = ProdialConfig(r=3, lora_alpha=6, diagonal="free", train_ssm="all")
    model = adapted(mixer, config, bias=True)
    offsets = move(model)
    got = gradients(model, offsets)
    plain = copy.deepcopy(model)
    layers = {n: m for n, m in plain.named_modules() if isinstance(m, ProdialLinear)}
    remove_prodial(plain)
    for path, layer in layers.items():
        effective = EffectiveWeight(layer).double()
        parametrize.register_parametrization(plain.get_submodule(path), "weight", effective)
    own = {name.replace(OFFSET, ""): offset for name, offset in offsets.items()}
    for name, offset in own.items():
        plain.get_parameter(name).data += offset.detach()
    for layer in plain.layers:
        layer.mixer.use_fast_path = layer.mixer.use_mem_eff_path = False
    expected = gradients(plain, own)
    for name, gradient in got.items():
        reference = expected[name.replace(OFFSET, "")]
        # A, D and the bias of the step go through fp32, upstream too.
        assert (gradient - reference).norm() <= 1e-6 * reference.norm(), name
        assert gradient.count_nonzero()


def gradients(model: nn.Module, names: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.requires_grad_(False)
    for name in names:
        model.get_parameter(name).requires_grad_()
    logits = model(mixer_ids())
    logits.backward(torch.linspace(-1, 1, logits.numel()).view_as(logits).double())
    return {name: model.get_parameter(name).grad for name in names}


def test_vims_second_direction_is_found() -> None:
    from prodial_kernels import VisionMamba

    model = VisionMamba(16, depth=1, num_classes=5, image_size=16, patch_size=8)
    apply_prodial(model, ProdialConfig(r=2, train_ssm=("A_log", "D", "dt_bias")))
    names = {n.rpartition(".mixer.")[2] for n, _ in model.named_parameters() if OFFSET in n}
    assert names == {
        f"{child}{OFFSET}{name}"
        for child, name in [
            ("", "A_log"), ("", "A_b_log"), ("", "D"), ("", "D_b"), ("dt_proj.", "bias"),
            ("dt_proj_b.", "bias"),
        ]
    }  # fmt: skip
    model(torch.randn(1, 3, 16, 16)).sum().backward()
    assert all(p.grad.count_nonzero() for n, p in model.named_parameters() if OFFSET in n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_loaded_merged_removed(dtype: torch.dtype, tmp_path: Path) -> None:
    config = ProdialConfig(
        r=2, target_modules=("in_proj", "dt_proj"), train_ssm=("A_log", "dt_bias", "conv1d")
    )
    plain = build("mamba").to(dtype)
    model = copy.deepcopy(plain)
    apply_prodial(model, dataclasses.replace(config, train_ssm=()))
    before = model(input_ids=token_ids(), use_cache=False).logits
    remove_prodial(model)
    apply_prodial(model, config)
    assert torch.equal(model(input_ids=token_ids(), use_cache=False).logits, before)
    moved = move(model)
    assert {offset.dtype for offset in moved.values()} == {torch.float32}
    randomise_adapters(model)
    logits = model.eval()(input_ids=token_ids(), use_cache=False).logits
    assert not torch.allclose(logits, before)

    save_adapter(model, tmp_path)
    held = {name for name in read_adapter(tmp_path).tensors if OFFSET in name}
    assert held == {name.replace(".base_layer.", ".") for name in moved}
    again = copy.deepcopy(plain).eval()
    load_adapter(again, tmp_path)
    assert torch.equal(again(input_ids=token_ids(), use_cache=False).logits, logits)
    load_adapter(again, tmp_path)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(again)))
    assert torch.equal(twin(input_ids=token_ids(), use_cache=False).logits, logits)
    with adapter_disabled(again):
        off = again(input_ids=token_ids(), use_cache=False).logits
    assert torch.equal(off, plain.eval()(input_ids=token_ids(), use_cache=False).logits)
    assert torch.equal(again(input_ids=token_ids(), use_cache=False).logits, logits)

    remove_prodial(again)
    assert all(torch.equal(p, dict(plain.named_parameters())[n])
               for n, p in again.named_parameters())  # fmt: skip
    merge_prodial(model)
    assert {n: p.shape for n, p in model.state_dict().items()} == {
        n: p.shape for n, p in plain.state_dict().items()
    }
    assert {type(m) for m in model.modules()} == {type(m) for m in plain.modules()}
    merged = model(input_ids=token_ids(), use_cache=False).logits
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(merged, logits, rtol=tolerance, atol=tolerance)
    mixer = model.backbone.layers[0].mixer
    assert torch.equal(
        mixer.A_log, (plain.backbone.layers[0].mixer.A_log + moved[names(moved)[0]]).to(dtype)
    )
    assert mixer.A_log.requires_grad


def names(moved: dict[str, Any]) -> list[str]:
    return sorted(name for name in moved if name.endswith("layers.0.mixer.prodial_offset_A_log"))


def test_what_the_pretrained_model_has_is_not_what_the_file_holds(tmp_path: Path) -> None:
    """The base is recognised by the pretrained values, also after training."""
    model = adapt("mamba2")
    save_adapter(model, tmp_path)
    other = build("mamba2")
    with torch.no_grad():
        other.backbone.layers[0].mixer.A_log += 1
    with pytest.raises(AdapterError, match="other weights"):
        load_adapter(other, tmp_path)
    other = build("mamba2")
    apply_prodial(other, ProdialConfig(r=3, lora_alpha=6, diagonal="free"))
    with pytest.raises(AdapterError, match="another configuration"):
        load_adapter(other, tmp_path)


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.to("cpu", torch.float16)])
def test_casts_leave_offsets_in_fp32(cast: Callable[[nn.Module], nn.Module]) -> None:
    model = adapt("mamba2")
    value = model.backbone.layers[0].mixer._parameters[f"{OFFSET}A_log"].detach().clone()
    model = cast(model)
    mixer = model.backbone.layers[0].mixer
    assert mixer.A_log.dtype == mixer._parameters["A_log"].dtype != torch.float32
    assert torch.equal(mixer._parameters[f"{OFFSET}A_log"], value)
    assert adapt("mamba2").double().backbone.layers[0].mixer.A_log.dtype == torch.float64


def test_decay_alone_leads_back_to_the_pretrained_values() -> None:
    model = adapt("mamba")
    pretrained = build("mamba")
    groups = adapter_parameter_groups(model, weight_decay=0.5)
    decayed = {id(p) for p in groups[0]["params"]}
    assert decayed >= {id(p) for n, p in model.named_parameters() if OFFSET in n}
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for _ in range(300):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
    for ours, theirs in zip(ssm_parameters(model), ssm_parameters(pretrained), strict=True):
        assert ours.path == theirs.path
        torch.testing.assert_close(getattr(ours.owner, ours.name), theirs.value)


def test_compiled() -> None:
    model = adapt("mamba2", num_hidden_layers=1)
    expected = training_step(model, token_ids())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    step = training_step(compiled, token_ids())
    renamed = {n.removeprefix("_orig_mod."): g for n, g in step.gradients.items()}
    assert_alive_and_equal(Step(step.logits, renamed), expected)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: build("mamba2"), {"train_ssm": ("B",)}, "train_ssm must be one of 'A_log', 'D'"),
        (Toy, {"train_ssm": ("D",)}, "train_ssm='D' is in no mixer of this model; .* none of"),
        (Toy, {"train_ssm": ("all",)}, "train_ssm='all' is in no mixer"),
        (
            lambda: build("mamba2", use_conv_bias=False),
            {"train_ssm": ("conv1d",), "modules_to_save": ("conv1d",)},
            "conv1d.weight is in train_ssm='conv1d' and in modules_to_save",
        ),
    ],
)
def test_refusals(model: Callable[[], nn.Module], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_prodial(model(), ProdialConfig(r=2, **options))


def test_a_step_that_diverged_is_not_merged() -> None:
    model = adapt("mamba2")
    with torch.no_grad():
        model.backbone.layers[1].mixer._parameters[f"{OFFSET}D"][0] = float("inf")
    with pytest.raises(ValueError, match="D of a Mamba2Mixer is not finite with its offset"):
        merge_prodial(model)
    assert model.backbone.layers[0].mixer._parameters[f"{OFFSET}D"] is not None


def test_the_merge_of_a_quantized_base_folds_offsets() -> None:
    from prodial_kernels import merge_quantized, quantize_model

    model = build("mamba2")
    quantize_model(model, "int8")
    apply_prodial(model, ProdialConfig(r=2, train_ssm=("D",)))
    move(model)
    expected = model.backbone.layers[0].mixer.D.detach().clone()
    merge_quantized(model, "int8")
    assert torch.equal(model.backbone.layers[0].mixer._parameters["D"], expected)


def test_the_plan_counts_what_a_trained_a_log_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    from prodial_kernels.training.memory.activations import KEEP, kept
    from prodial_kernels.training.memory.part_bytes import Tokens
    from prodial_kernels.training.memory.shapes import describe_model
    from support.live_storages import LiveStorages

    cuda_stand_ins.install(monkeypatch)
    planned, measured = [], []
    for parts in ((), ("A_log",)):
        model = adapt("mamba", ProdialConfig(r=2, train_ssm=parts), state_size=32)
        shape = describe_model(model, kernels=True)
        planned.append(sum(kept(layer, Tokens(2, 7, 4), KEEP) for layer in shape.layers))
        with LiveStorages() as live:
            output = model(input_ids=token_ids(), use_cache=False)
            measured.append(live.bytes(without=()))
        del output
    assert planned[1] - planned[0] == measured[1] - measured[0] == 2 * 4 * 32 * 32


def test_save_pretrained_writes_what_the_model_computes(tmp_path: Path) -> None:
    config = ProdialConfig(r=2, target_modules=("in_proj", "dt_proj"), train_ssm="all")
    model = adapt("mamba", config).eval()
    logits = model(input_ids=token_ids(), use_cache=False).logits
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path).eval()
    found = plain(input_ids=token_ids(), use_cache=False).logits
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    # A trainer that resumes loads the same file into a model with the adapter.
    again = build("mamba").eval()
    apply_prodial(again, config)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert torch.equal(again(input_ids=token_ids(), use_cache=False).logits, logits)
    twice = adapt("mamba", config).eval()
    twice.load_state_dict(again.state_dict())
    assert torch.equal(twice(input_ids=token_ids(), use_cache=False).logits, logits)
    for ours, theirs in zip(ssm_parameters(again), ssm_parameters(build("mamba")), strict=True):
        assert torch.equal(ours.value, theirs.value)


def test_inspection_lists_offsets(tmp_path: Path) -> None:
    model = adapt("mamba2", ProdialConfig(r=2, train_ssm=("D",)))
    save_adapter(model, tmp_path)
    inspection = inspect_adapter(tmp_path)
    assert [*inspection.offsets] == [f"backbone.layers.{i}.mixer.D" for i in range(2)]
    largest = model.backbone.layers[1].mixer._parameters[f"{OFFSET}D"].detach().abs().max()
    assert inspection.offsets["backbone.layers.1.mixer.D"][1] == pytest.approx(float(largest))
    assert "trained beside" in str(inspection)
