"""PEFT's adapters and ProDiaL's in one model: neither freezes the other without a word."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from prodial_kernels import ProdialConfig, apply_prodial, merge_prodial, save_adapter
from support.mixers.toy import Toy, toy_ids

peft = pytest.importorskip("peft")

CONFIG = ProdialConfig(r=2, n_blocks=3)


def with_lora(model: nn.Module) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["stem"]))


def test_a_model_with_peft_layers_is_refused_and_stays() -> None:
    model = Toy()
    with_lora(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert any(flags.values())
    with pytest.raises(ValueError, match=r"1 layers of PEFT, such as stem, .*merge_and_unload"):
        apply_prodial(model, CONFIG)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_after_peft_is_gone_it_can_be_adapted() -> None:
    model = with_lora(Toy()).merge_and_unload()
    assert apply_prodial(model, CONFIG).trainable > 0


# What torch's own tracing says of itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_training_beside_a_frozen_adapter_is_refused(compiled: bool) -> None:
    model = Toy(depth=2)
    apply_prodial(model, CONFIG)
    wrapped = with_lora(model)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "prodial_" in n)
    if compiled:
        wrapped = torch.compile(wrapped, backend="eager")
    with pytest.raises(RuntimeError, match=r"frozen, .*PEFT froze .* such as stem.*requires_grad_"):
        wrapped(toy_ids())
    # Nothing is lost where nothing is trained.
    wrapped.eval()(toy_ids())
    with torch.no_grad():
        wrapped.train()(toy_ids())


def test_both_train_as_the_message_says() -> None:
    model = Toy()
    apply_prodial(model, CONFIG)
    wrapped = with_lora(model)
    for name, parameter in model.named_parameters():
        if "prodial_" in name:
            parameter.requires_grad_(True)
    wrapped(toy_ids()).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("lora_" in name for name in trained)
    assert any("prodial_" in name for name in trained)


def test_a_merged_adapter_is_no_obstacle() -> None:
    model = Toy()
    apply_prodial(model, CONFIG)
    with_lora(merge_prodial(model))(toy_ids()).sum().backward()


def test_prompts_freeze_too_and_are_warned_of() -> None:
    """Prompt tuning puts nothing into the model that it freezes."""
    model = Toy()
    apply_prodial(model, CONFIG)
    model.requires_grad_(False)
    model.blocks[0].norm.requires_grad_(True)
    with pytest.warns(UserWarning, match="every ProDiaL parameter of this Toy is frozen"):
        model(toy_ids())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(toy_ids())


def test_part_of_the_adapter_may_be_frozen() -> None:
    model = Toy()
    apply_prodial(model, CONFIG)
    model.blocks[0].requires_grad_(False)
    model(toy_ids()).sum().backward()


def test_a_wrapper_that_passes_attributes_on_is_not_the_model(tmp_path) -> None:
    model = Toy()
    apply_prodial(model, CONFIG)
    wrapped = with_lora(copy.deepcopy(model))
    with pytest.raises(ValueError, match="has no ProDiaL adapter; pass the very module"):
        save_adapter(wrapped, tmp_path / "adapter")
