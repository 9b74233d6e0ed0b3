"""16-bit modules and parameters that are trained beside the adapter, through fp32 masters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from prodial_kernels import (
    ProdialConfig,
    VisionMamba,
    apply_prodial,
    load_adapter,
    merge_prodial,
    remove_prodial,
    save_adapter,
)
from prodial_kernels.training.step.optimizers import adapter_parameter_groups
from support.mixers.toy import Toy, toy_ids
from support.models import build, token_ids

HALF = (torch.bfloat16, torch.float16)
CONFIG = ProdialConfig(r=2, modules_to_save=("norm", "conv1d"))


def train(dtype: torch.dtype, lr: float, steps: int = 30) -> tuple[float, torch.Tensor]:
    """Loss at the end, and how far the head's weight moved."""
    torch.manual_seed(0)
    model = VisionMamba(16, depth=1, num_classes=5, image_size=16, patch_size=8).to(dtype)
    apply_prodial(model, ProdialConfig(r=2, modules_to_save=("head",)))
    head = dict(model.named_parameters())["head.weight"]
    before = head.detach().clone()
    optimizer = torch.optim.AdamW(adapter_parameter_groups(model, weight_decay=0.0), lr=lr)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(16, 3, 16, 16, generator=generator).to(dtype)
    labels = torch.arange(16) % 5
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model.train()(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), head.detach() - before


@pytest.mark.parametrize("lr", [1e-3, 5e-6])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_head_of_16_bits_trains_as_one_of_32(dtype: torch.dtype, lr: float) -> None:
    loss, moved = train(dtype, lr)
    expected_loss, expected = train(torch.float32, lr)
    assert loss == pytest.approx(expected_loss, rel=0.02)
    assert moved.dtype == torch.float32
    # Every step counts, however small it is beside the weight. AdamW steps by lr whatever the
    # gradient's size, so a few gradients near zero go the other way.
    assert ((moved - expected).abs() < 0.3 * 30 * lr).float().mean() > 0.9


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_model_computes_as_before(dtype: torch.dtype) -> None:
    model = Toy().to(dtype)
    apply_prodial(model, ProdialConfig(r=2))
    before = model(toy_ids())
    remove_prodial(model)
    apply_prodial(model, CONFIG)
    norm = model.blocks[0].norm
    assert dict(norm.named_parameters())["weight"].dtype == torch.float32
    assert norm.weight.dtype == dtype
    after = model(toy_ids())
    assert after.dtype == dtype
    assert torch.equal(after, before)
    after.float().sum().backward()
    assert dict(norm.named_parameters())["weight"].grad.dtype == torch.float32
    assert type(norm).__name__ == "LayerNorm"
    assert isinstance(norm, nn.LayerNorm)


def test_32_bits_stay_what_they_are() -> None:
    model = Toy()
    apply_prodial(model, CONFIG)
    assert type(model.blocks[0].norm) is nn.LayerNorm


@pytest.mark.parametrize("undo", [remove_prodial, merge_prodial])
def test_undoing_rounds_once(undo: Callable[[Toy], Toy]) -> None:
    model = Toy().bfloat16()
    apply_prodial(model, CONFIG)
    master = model.blocks[0].norm._parameters["weight"]
    with torch.no_grad():
        master += 0.3
    value = master.detach().clone()
    undo(model)
    assert type(model.blocks[0].norm) is nn.LayerNorm
    assert model.blocks[0].norm.weight is master
    assert torch.equal(master, value.bfloat16())
    assert "_prodial_read_as" not in vars(model.blocks[0].norm)


@pytest.mark.parametrize(
    ("cast", "read_as", "kept"),
    [
        (lambda m: m.half(), torch.float16, torch.float32),
        (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16, torch.float32),
        (lambda m: m.float(), torch.float32, torch.float32),
        (lambda m: m.double(), torch.float64, torch.float64),
    ],
)
def test_casts_keep_the_masters(cast: Any, read_as: torch.dtype, kept: torch.dtype) -> None:
    model = Toy().bfloat16()
    apply_prodial(model, CONFIG)
    norm = model.blocks[1].norm
    master = norm._parameters["weight"]
    model(toy_ids()).float().sum().backward()
    with torch.no_grad():
        master += 1e-6
    value = master.detach().clone()
    cast(model)
    assert norm._parameters["weight"] is master
    assert (master.dtype, master.grad.dtype, norm.weight.dtype) == (kept, kept, read_as)
    assert torch.equal(master.float(), value)
    assert model(toy_ids()).dtype == read_as


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(duplicate: Callable[[nn.Module], Any]) -> None:
    model = Toy().bfloat16()
    apply_prodial(model, CONFIG)
    twin = duplicate(model)
    assert torch.equal(twin(toy_ids()), model(toy_ids()))
    assert twin.blocks[0].norm._parameters["weight"].dtype == torch.float32
    remove_prodial(twin)
    assert twin.blocks[0].norm.weight.dtype == torch.bfloat16
    assert model.blocks[0].norm._parameters["weight"].dtype == torch.float32


def test_tied_parameters_stay_tied() -> None:
    model = Toy().bfloat16()
    apply_prodial(model, ProdialConfig(r=2, modules_to_save=("head",)))
    assert model.head._parameters["weight"] is model.embedding._parameters["weight"]
    assert model.head.weight.dtype == model.embedding.weight.dtype == torch.bfloat16
    model(toy_ids()).float().sum().backward()
    remove_prodial(model)
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.dtype == torch.bfloat16


def test_compiled() -> None:
    model = Toy().bfloat16()
    apply_prodial(model, CONFIG)
    expected = model(toy_ids())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(toy_ids()), expected)
    with torch.no_grad():
        model.blocks[0].norm._parameters["weight"] += 1
    torch.testing.assert_close(compiled(toy_ids()), model(toy_ids()))


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_h1"])
def test_parameters_of_mixers_by_name(family: str, tmp_path: Any) -> None:
    """What the scans read, as parameters of the mixer itself."""
    config = ProdialConfig(r=2, modules_to_save=("A_log", "D", "dt_bias" if family != "mamba" else
                                                 "dt_proj.bias"))  # fmt: skip
    model = build(family).bfloat16()
    apply_prodial(model, config)
    names = {n for n, p in model.named_parameters() if p.requires_grad and "prodial_" not in n}
    assert {name.rpartition(".")[2] for name in names} >= {"A_log", "D"}
    assert all(dict(model.named_parameters())[name].dtype == torch.float32 for name in names)
    loss = model(input_ids=token_ids(), use_cache=False).logits.float().square().mean()
    loss.backward()
    assert all(dict(model.named_parameters())[name].grad is not None for name in names)
    with torch.no_grad():
        for name in names:
            dict(model.named_parameters())[name].add_(1e-4)
    save_adapter(model, tmp_path)
    again = build(family).bfloat16()
    load_adapter(again, tmp_path)
    for name in names:
        assert torch.equal(
            dict(again.named_parameters())[name], dict(model.named_parameters())[name]
        )
