"""All twenty variations of MambaPEFT's methods on a small ``VisionMamba``, alone and together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import (
    AdditionalScan,
    AffixTuning,
    BitFit,
    LinearProbe,
    Lora,
    ParallelAdapter,
    PartialLora,
    PartialTuning,
    ProdialConfig,
    PromptTuning,
    VisionMamba,
    adapter_disabled,
    adapter_parameter_groups,
    apply_methods,
    load_adapter,
    merge_prodial,
    remove_prodial,
    save_adapter,
)
from support.mixers.vision import images
from support.mixers.vision import tiny_vision_mamba as tiny

VARIATIONS: dict[str, Any] = {
    **{f"lora-{name}": Lora((name,), r=2) for name in ("in_proj", "out_proj", "x_proj", "dt_proj")},
    "lora-embed": Lora(("embed",), r=2),
    **{f"partial-lora-{rows}": PartialLora((rows,), r=2) for rows in ("X", "Z", "d", "B", "C")},
    "parallel-adapter": ParallelAdapter(r=4),
    "prompt-tokens": PromptTuning(4),
    "prompt-network": PromptTuning(4, mlp=True),
    "affix-tokens": AffixTuning(3),
    "affix-network": AffixTuning(3, mlp=True, hidden=6),
    "additional-scan": AdditionalScan(2, "prefix"),
    **{f"partial-{part}": PartialTuning((part,)) for part in ("A_log", "D", "conv1d", "dt_bias")},
}
BESIDE_THEM: dict[str, Any] = {
    "partial-pos_embed": PartialTuning(("pos_embed", "cls_token")),
    "bitfit": BitFit(),
    "linear-probe": LinearProbe(),
}
KEPT = ("parallel-adapter", "prompt-tuning", "affix-tuning")
ELSEWHERE = ("prompt-tuning", "affix-tuning")  # these do not begin at the pretrained function
TOGETHER: list[Any] = [
    ProdialConfig(r=2, block_size=2, modules_to_save=("head",)),
    Lora(("in_proj", "x_proj", "dt_proj", "embed"), r=2),
    PartialLora(("X", "d", "C"), r=2),
    PartialTuning(("A_log", "conv1d", "pos_embed", "cls_token"), decay=10.0),
    AdditionalScan(2, decay=0.1),
    ParallelAdapter(r=2),
    AffixTuning(2),
    PromptTuning(4, mlp=True, hidden=3),
]


def train(model: VisionMamba, steps: int = 6) -> list[float]:
    """Learn eight images by heart; return the losses."""
    x, labels = images(8), torch.arange(8) % 5
    optimizer = torch.optim.AdamW(adapter_parameter_groups(model, weight_decay=0.01), lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_there_are_twenty() -> None:
    assert len(VARIATIONS) == 20


@pytest.mark.parametrize("name", [*VARIATIONS, *BESIDE_THEM])
def test_every_variation_trains_is_saved_and_merged(name: str, tmp_path: Path) -> None:
    method = (VARIATIONS | BESIDE_THEM)[name]
    model = tiny()
    before = model(images())
    apply_methods(model, [method])
    begins = torch.allclose(model(images()), before, rtol=1e-4, atol=1e-5)
    assert begins is (method.name not in ELSEWHERE)
    at_first = trained(model)
    losses = train(model)
    assert losses[-1] < losses[0]
    moved = trained(model)
    assert all(not torch.equal(moved[key], value) for key, value in at_first.items())
    result = model(images())
    save_adapter(model, tmp_path)
    other = tiny()
    load_adapter(other, tmp_path)
    assert torch.equal(other(images()), result)
    if method.name in KEPT:
        with pytest.raises(ValueError, match=f"{method.name} cannot be merged"):
            merge_prodial(other)
    else:
        merge_prodial(other)
        assert not any("prodial" in key for key in other.state_dict())
        torch.testing.assert_close(other(images()), result, rtol=1e-4, atol=1e-5)
    if method.name == "linear-probe":
        return
    with adapter_disabled(model):
        torch.testing.assert_close(model(images()), before)
    torch.testing.assert_close(remove_prodial(model)(images()), before)


def test_all_together(tmp_path: Path) -> None:
    model = tiny()
    apply_methods(model, TOGETHER)
    losses = train(model, 12)
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    result = model(images())
    assert torch.equal(copy.deepcopy(model)(images()), result)
    save_adapter(model, tmp_path)
    other = tiny()
    load_adapter(other, tmp_path)
    assert torch.equal(other(images()), result)
    assert train(other, 1) == pytest.approx(train(model, 1))


def test_what_cannot_be_merged_may_stay() -> None:
    model = tiny()
    apply_methods(model, TOGETHER)
    train(model, 3)
    result = model(images())
    merge_prodial(model, keep=True)
    torch.testing.assert_close(model(images()), result, rtol=1e-4, atol=1e-5)
    kept = {name.rpartition("prodial_added_")[2].partition("_")[0] for name in trained(model)}
    assert kept == {"parallel", "affix", "prompt"}


def test_what_merges_becomes_a_plain_model() -> None:
    model = tiny()
    apply_methods(model, [m for m in TOGETHER if getattr(m, "name", None) not in KEPT])
    train(model)
    result = model(images())
    merge_prodial(model)
    # 2 more states than the pretrained model's 4.
    plain = tiny(d_state=6)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(images()), result, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lora-embed", "additional-scan", "partial-pos_embed"])
def test_every_gradient_is_that_of_a_plain_model_with_those_parameters(name: str) -> None:
    """In fp64: the parameters formed by hand, and the plain model's own gradients carried on."""
    model = tiny().double()
    apply_methods(model, [(VARIATIONS | BESIDE_THEM)[name]])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    x = images().double()
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    output = model(x)
    found = torch.autograd.grad(output.square().sum(), list(own.values()))
    plain = tiny(d_state=6 if name == "additional-scan" else 4).double()
    formed = formed_parameters(tiny().double(), own)
    result = torch.func.functional_call(plain, formed, (x,))
    torch.testing.assert_close(output, result)
    expected = torch.autograd.grad(result.square().sum(), list(own.values()))
    for key, got, exact in zip(own, found, expected, strict=True):
        assert got.count_nonzero(), key
        torch.testing.assert_close(got, exact, msg=key)


def formed_parameters(plain: nn.Module, own: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """A plain model's parameters from what trains, by the methods' definitions."""
    formed = {n: p.detach() for n, p in plain.named_parameters()}
    for name in list(formed):
        path, _, leaf = name.rpartition(".")
        prefix = f"{path}." if path else ""
        value = formed[name]
        offset = own.get(f"{prefix}prodial_offset_{leaf}")
        if offset is not None:
            value = value + offset
        a = own.get(f"{prefix}prodial_added_lora_a") if leaf == "weight" else None
        if a is not None:
            value = value + (own[f"{prefix}prodial_added_lora_b"] @ a).view_as(value)
        columns = own.get(f"{prefix}prodial_added_scan_{leaf}")
        if columns is not None:
            value = torch.cat([value[:, :2] + columns, value], 1)
        b = own.get(f"{prefix}prodial_added_scan_B") if leaf == "weight" else None
        if b is not None:
            dt, own_b, own_c = value.split([len(value) - 8, 4, 4])
            c = own[f"{prefix}prodial_added_scan_C"]
            value = torch.cat([dt, own_b[:2] + b, own_b, c, own_c])
        formed[name] = value
    return formed


def test_a_bias_trains_once() -> None:
    """In place, with the head that it belongs to; as an offset anywhere else."""
    model = tiny()
    apply_methods(model, [BitFit(), LinearProbe(("head",))])
    names = set(trained(model))
    assert {"head.weight", "head.bias", "patch_embed.proj.prodial_offset_bias"} <= names
    assert "head.prodial_offset_bias" not in names
    with pytest.raises(ValueError, match=r"head.bias is in modules_to_save .* in a method"):
        apply_methods(tiny(), [ProdialConfig(modules_to_save=("head",)), BitFit()])
