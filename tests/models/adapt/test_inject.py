"""Putting adapters into any module, merging them, taking them out, undoing everything."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from prodial_kernels import (
    ProdialConfig,
    ProdialLinear,
    apply_prodial,
    merge_prodial,
    remove_prodial,
)
from prodial_kernels.models.adapt.inject import get_prodial_config
from support.mixers.snapshots import CONFIG, EVERYTHING, snapshot
from support.mixers.toy import Toy, toy_ids
from support.models import randomise_adapters


def adapted(config: ProdialConfig = EVERYTHING) -> Toy:
    model = Toy()
    apply_prodial(model, config)
    randomise_adapters(model)
    return model


def test_replaces_targets_and_freezes_the_rest() -> None:
    model = Toy()
    before = model(toy_ids())
    report = apply_prodial(model, CONFIG)
    adapters = [n for n, m in model.named_modules() if isinstance(m, ProdialLinear)]
    assert adapters == [f"blocks.{i}.{p}_proj" for i in range(3) for p in ("in", "out")]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "prodial_" in n}
    assert len(trained) == 6 * 4
    assert model.blocks[0].in_proj.block_size == 2
    assert model.blocks[0].out_proj.block_size == 4
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(model(toy_ids()), before)
    assert type(model) is Toy


def test_options_reach_the_layers() -> None:
    config = ProdialConfig(
        r=3, lora_alpha=12, lora_dropout=0.25, target_modules=["in_proj", "stem"],
        block_size={"in_proj": 3}, diagonal="free", train_scale=False, impl="reference",
    )  # fmt: skip
    model = adapted(config)
    layer = model.blocks[2].in_proj
    assert (layer.r, layer.lora_scaling, layer.lora_dropout) == (3, 4.0, 0.25)
    assert (layer.block_size, layer.diagonal, layer.impl) == (3, "free", "reference")
    assert layer.prodial_scale is None
    assert model.stem.block_size == 1
    assert adapted(ProdialConfig(r=0)).blocks[0].in_proj.prodial_a is None
    assert adapted(ProdialConfig(train_diagonal=False)).blocks[0].in_proj.prodial_blocks is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_keeps_mode_and_dtype(training: bool, dtype: torch.dtype) -> None:
    model = Toy().to(dtype).train(training)
    model.blocks[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    apply_prodial(model, CONFIG)
    assert modes.items() <= {name: m.training for name, m in model.named_modules()}.items()
    layer = model.blocks[0].in_proj
    assert layer.base_layer.training is training
    assert layer.base_layer.weight.dtype == dtype
    assert layer.prodial_scale.dtype == torch.promote_types(dtype, torch.float32)
    assert model(toy_ids()).dtype == dtype
    merge_prodial(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.blocks[0].in_proj.weight.dtype == dtype


def test_stays_on_its_device() -> None:
    with torch.device("meta"):
        model = Toy()
    report = apply_prodial(model, CONFIG)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert report.trainable > 0


def test_shared_layers_become_one_adapted_layer() -> None:
    model = Toy()
    linear = model.shared
    apply_prodial(model, EVERYTHING)
    assert isinstance(model.shared, ProdialLinear)
    assert model.blocks[1].twin is model.shared
    merge_prodial(model)
    assert type(model.shared) is nn.Linear
    assert model.blocks[1].twin is model.shared
    model = Toy()
    linear = model.shared
    # One of the two names is enough.
    apply_prodial(model, ProdialConfig(r=2, target_modules=("twin",)))
    assert model.blocks[1].twin is model.shared
    assert isinstance(model.shared, ProdialLinear)
    remove_prodial(model)
    assert model.blocks[1].twin is model.shared is linear


def test_tied_weights() -> None:
    """The head's weight is the embedding's: adapting the head must leave the embedding alone."""
    model = adapted()
    assert model.head.base_layer.weight is model.embedding.weight
    original = model.embedding.weight.clone()
    logits = model(toy_ids())
    merge_prodial(model)
    assert torch.equal(model.embedding.weight, original)
    assert model.head.weight is not model.embedding.weight
    torch.testing.assert_close(model(toy_ids()), logits)
    untouched = adapted()
    remove_prodial(untouched)
    assert untouched.head.weight is untouched.embedding.weight


def test_merge_computes_the_same() -> None:
    model = adapted()
    model.stem.base_layer.bias.data += 1
    logits = model(toy_ids())
    weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, ProdialLinear)}
    assert merge_prodial(model) is model
    torch.testing.assert_close(model(toy_ids()), logits)
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
    assert model.state_dict().keys() == Toy().state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_merge_holds_one_layer_more_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Toy(depth=4)
    apply_prodial(model, CONFIG)
    old = [
        weakref.ref(m.base_layer.weight) for m in model.modules() if isinstance(m, ProdialLinear)
    ]
    alive: list[int] = []
    original = ProdialLinear.to_linear

    def counted(layer: ProdialLinear) -> nn.Linear:
        alive.append(sum(weight() is not None for weight in old))
        return original(layer)

    monkeypatch.setattr(ProdialLinear, "to_linear", counted)
    gc.disable()
    try:
        merge_prodial(model)
    finally:
        gc.enable()
    assert alive == list(range(8, 0, -1))


def test_remove_restores_everything() -> None:
    model = Toy()
    model.blocks[0].norm.requires_grad_(False)
    model.blocks[2].out_proj.weight.requires_grad_(False)
    model.blocks[1].eval()
    before, logits = snapshot(model), model(toy_ids())
    apply_prodial(model, EVERYTHING)
    randomise_adapters(model)
    model(toy_ids()).sum().backward()
    assert snapshot(model) != before
    assert remove_prodial(model) is model
    assert snapshot(model) == before
    assert torch.equal(model(toy_ids()), logits)


def test_can_be_applied_again() -> None:
    model = adapted()
    for undo in (remove_prodial, merge_prodial):
        undo(model)
        assert apply_prodial(model, CONFIG).trainable > 0
    assert get_prodial_config(model) is CONFIG


def test_modules_to_save_stay_trainable() -> None:
    model = Toy()
    model.register_buffer("steps", torch.zeros(1))
    apply_prodial(model, ProdialConfig(r=2, modules_to_save=("norm", "conv1d")))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "prodial_" not in n}
    norms = {f"blocks.{i}.norm.{kind}" for i in range(3) for kind in ("weight", "bias")}
    assert trained == norms | {"conv1d.weight", "conv1d.bias"}


def test_modules_to_save_that_were_frozen_are_trained_and_frozen_again() -> None:
    model = Toy().requires_grad_(False)
    apply_prodial(model, ProdialConfig(r=2, modules_to_save=("norm",)))
    assert model.blocks[0].norm.weight.requires_grad
    remove_prodial(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_deepcopy_and_pickle(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = adapted()
    twin = duplicate(model)
    assert torch.equal(twin(toy_ids()), model(toy_ids()))
    assert get_prodial_config(twin) == EVERYTHING
    logits = model(toy_ids())
    merge_prodial(twin)
    torch.testing.assert_close(twin(toy_ids()), logits)
    assert torch.equal(model(toy_ids()), logits)
    assert isinstance(model.stem, ProdialLinear)


def test_two_private_attributes_are_added_and_taken_away() -> None:
    model = Toy()
    before = set(vars(model))
    apply_prodial(model, CONFIG)
    # What undoing needs, and what refuses to save a model around this one with adapted layers.
    assert set(vars(model)) - before == {"_prodial_state", "_prodial_part_of_another"}
    assert model.state_dict().keys() >= {"blocks.0.in_proj.prodial_a", "stem.weight"}
    remove_prodial(model)
    assert set(vars(model)) == before


@pytest.mark.parametrize("function", [merge_prodial, remove_prodial, get_prodial_config])
def test_without_an_adapter(function: Callable[[nn.Module], object]) -> None:
    with pytest.raises(ValueError, match="Toy has no ProDiaL adapter"):
        function(Toy())
    with pytest.raises(ValueError, match=r"Sequential has no ProDiaL adapter.*not a wrapper"):
        function(nn.Sequential(adapted()))
    with pytest.raises(ValueError, match="Block has no ProDiaL adapter"):
        function(adapted().blocks[0])
    model = adapted()
    merge_prodial(model)
    with pytest.raises(ValueError, match="has no ProDiaL adapter"):
        function(model)


def test_already_adapted() -> None:
    for model in (adapted(), nn.Sequential(adapted())):
        with pytest.raises(ValueError, match=r"already adapted; call remove_prodial\(model\)"):
            apply_prodial(model, CONFIG)


def test_a_failure_while_building_leaves_the_model_untouched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Toy()
    before = snapshot(model)
    built: list[ProdialLinear] = []
    original = ProdialLinear.from_config

    def fail_late(linear: nn.Linear, config: ProdialConfig, target: str) -> ProdialLinear:
        if len(built) == 3:
            raise MemoryError("no memory for the fourth layer")
        built.append(original(linear, config, target))
        return built[-1]

    monkeypatch.setattr(ProdialLinear, "from_config", fail_late)
    with pytest.raises(MemoryError, match="fourth"):
        apply_prodial(model, CONFIG)
    assert snapshot(model) == before


def test_arguments() -> None:
    with pytest.raises(TypeError, match="config must be a ProdialConfig, got dict"):
        apply_prodial(Toy(), {"r": 2})
    with pytest.raises(ValueError, match=r"itself an nn\.Linear.*from_linear"):
        apply_prodial(nn.Linear(4, 4), CONFIG)


def test_a_rank_beyond_the_layers_is_warned_of() -> None:
    model = Toy(width=20)
    with pytest.warns(UserWarning, match=r"r=20 is not below min.*=20 of a layer .* 1,200 param"):
        apply_prodial(model, ProdialConfig(r=20))
    remove_prodial(model)
    apply_prodial(model, ProdialConfig(r=19))
    # The default on a toy is no reason for a word.
    apply_prodial(Toy(width=6), ProdialConfig())


def test_a_string_that_matches_nothing_is_explained() -> None:
    with pytest.raises(ValueError, match=r"a string is an expression for whole dotted paths; give"):
        apply_prodial(Toy(), ProdialConfig(target_modules="in_proj|out_proj"))
    assert apply_prodial(Toy(), ProdialConfig(r=2, target_modules="in_proj")).trainable > 0


def test_what_is_made_in_inference_mode_trains_later() -> None:
    model = Toy()
    with torch.inference_mode():
        apply_prodial(model, CONFIG)
        model(toy_ids())
    model(toy_ids()).sum().backward()
    with torch.inference_mode():
        merge_prodial(model)
        apply_prodial(model, CONFIG)
        remove_prodial(model)
        assert not torch.is_grad_enabled()
    model(toy_ids()).sum().backward()
    assert not any(p.is_inference() for p in model.parameters())
    with torch.no_grad(), pytest.raises(ValueError, match="must divide"):
        apply_prodial(model, ProdialConfig(n_blocks=7))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("given", "named"), [(Toy, "the class Toy"), (None, "NoneType")])
def test_refuses_what_is_no_model(given: object, named: str) -> None:
    for call in (lambda: apply_prodial(given, CONFIG), lambda: merge_prodial(given)):
        with pytest.raises(TypeError, match=f"model must be an nn.Module, got {named}"):
            call()
