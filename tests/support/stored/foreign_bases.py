"""A model whose projectors another library stores: adapted, trained, switched, saved and merged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from prodial_kernels import (
    ProdialConfig,
    QuantizedLinear,
    adapter_disabled,
    add_adapter,
    apply_prodial,
    load_adapter,
    merge_prodial,
    remove_prodial,
    save_adapter,
    set_adapter,
)
from prodial_kernels.linear import adapted_layers
from prodial_kernels.quantization.foreign import from_foreign, is_foreign
from support.models import build, randomise_adapters, token_ids, training_step

CONFIG = ProdialConfig(r=2, n_blocks={"in_proj": 4, "out_proj": 2})


def with_projectors(
    replace: Callable[[nn.Linear], nn.Module], dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A tiny model whose projectors are as another library left them."""
    model = build("bamba").to(dtype)
    for module in list(model.modules()):
        for child in ("in_proj", "out_proj"):
            if type(getattr(module, child, None)) is nn.Linear:
                setattr(module, child, replace(getattr(module, child)))
    return model


def check_adapting(model: nn.Module, tmp_path: Path) -> None:
    """Adapt, train, switch, save, remove, load and merge."""
    ids = token_ids()
    before = {path: module for path, module in model.named_modules() if is_foreign(module)}
    assert len(before) >= 4
    # The same weights, dense.
    plain = copy.deepcopy(model)
    for path in before:
        linear = from_foreign(plain.get_submodule(path), torch.float32).to(torch.float32)
        plain.set_submodule(path, linear.to_linear())
    base = plain.eval()(input_ids=ids, use_cache=False).logits
    twin = copy.deepcopy(plain)

    apply_prodial(model, CONFIG, "first")
    layers = adapted_layers(model)
    assert layers.keys() == before.keys()
    assert all(isinstance(layer.base_layer, QuantizedLinear) for layer in layers.values())
    found = model.eval()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, base, rtol=1e-4, atol=1e-5)
    randomise_adapters(model)
    apply_prodial(twin, CONFIG)
    randomise_adapters(twin)
    ours, theirs = training_step(model, ids), training_step(twin, ids)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    for mine, dense_one in zip(ours.gradients.values(), theirs.gradients.values(), strict=True):
        assert mine is not None
        assert mine.count_nonzero()
        torch.testing.assert_close(mine, dense_one, rtol=1e-3, atol=1e-4)

    save_adapter(model, tmp_path / "adapter")
    trained = model.eval()(input_ids=ids, use_cache=False).logits
    add_adapter(model, "second", ProdialConfig(r=3, target_modules=["out_proj"]))
    set_adapter(model, "second")
    torch.testing.assert_close(
        model(input_ids=ids, use_cache=False).logits, base, rtol=1e-4, atol=1e-5
    )
    set_adapter(model, "first")
    with adapter_disabled(model):
        torch.testing.assert_close(
            model(input_ids=ids, use_cache=False).logits, base, rtol=1e-4, atol=1e-5
        )
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, trained)

    remove_prodial(model)
    assert all(model.get_submodule(path) is module for path, module in before.items())
    load_adapter(model, tmp_path / "adapter")
    assert torch.equal(model.eval()(input_ids=ids, use_cache=False).logits, trained)
    merge_prodial(model)
    assert {type(model.get_submodule(path)) for path in before} == {nn.Linear}
    assert {type(model.get_submodule(path).weight) for path in before} == {nn.Parameter}
    torch.testing.assert_close(
        model(input_ids=ids, use_cache=False).logits, trained, rtol=1e-4, atol=1e-5
    )
