"""Several adapters in one model: added, switched, disabled, merged, deleted, combined."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from prodial_kernels import (
    ProdialConfig,
    QuantizedLinear,
    adapter_disabled,
    apply_prodial,
    quantize_model,
    set_adapter,
)
from prodial_kernels.models.adapt.report import adapter_report
from prodial_kernels.peft import ProdialPeftConfig
from prodial_kernels.peft.layer import ProdialPeftLinear
from support.models import build, token_ids
from support.peft_models import MIXES_METHODS, adapted, config, layers, logits, move

IDS = token_ids()


def two() -> PeftModel:
    """``default`` on both projectors, and ``wide``, of another rank and other blocks, on one."""
    model = adapted()
    model.add_adapter("wide", config(r=5, n_blocks={"in_proj": 16}, target_modules=["in_proj"]))
    move(model, "wide", seed=3)
    return model


def test_each_adapter_computes_as_if_it_were_alone() -> None:
    model = two()
    first = logits(model, IDS)
    assert torch.equal(first, logits(adapted(), IDS))
    model.set_adapter("wide")
    second = logits(model, IDS)
    assert (first - second).abs().max() > 1e-2

    alone = adapted(adapter="wide", r=5, n_blocks={"in_proj": 16}, target_modules=["in_proj"])
    theirs = model.state_dict()
    alone.load_state_dict({n: theirs[n] for n in alone.state_dict() if ".wide." in n}, strict=False)
    assert torch.equal(logits(alone, IDS), second)
    model.set_adapter("default")
    assert torch.equal(logits(model, IDS), first)


def test_a_layer_compiles_without_graph_breaks() -> None:
    layer = layers(two())[0]
    x = torch.randn(3, 16)
    expected = layer(x)
    torch._dynamo.reset()
    found = torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


def test_only_the_active_adapter_trains() -> None:
    model = two()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".default." in name for name in trained)
    model.set_adapter("wide")
    model(input_ids=IDS, labels=IDS).loss.backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient
    assert all(".wide." in name and "in_proj" in name for name in with_gradient)


def test_disabling_gives_the_pretrained_model() -> None:
    model = two()
    expected = logits(build("mamba2"), IDS)
    adapted_logits = logits(model, IDS)
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), expected)
    with adapter_disabled(model):
        assert torch.equal(logits(model, IDS), expected)
    assert torch.equal(logits(model, IDS), adapted_logits)
    assert any(p.requires_grad for p in model.parameters())


def test_a_layer_without_the_active_adapter_comes_back_with_its_own() -> None:
    model = two()
    before = logits(model, IDS)
    model.set_adapter("wide")
    with adapter_disabled(model):
        pass
    model.set_adapter("default")
    assert torch.equal(logits(model, IDS), before)


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
def test_deleting() -> None:
    model = two()
    model.set_adapter("wide")
    wide = logits(model, IDS)
    model.set_adapter("default")
    model.delete_adapter("default")
    assert model.active_adapters == ["wide"]
    assert torch.equal(logits(model, IDS), wide)
    model.delete_adapter("wide")
    assert torch.equal(logits(model.base_model.model, IDS), logits(build("mamba2"), IDS))
    assert not [p for p in model.parameters() if p.requires_grad]


def test_merging_and_back_is_exact() -> None:
    model = two()
    separate = logits(model, IDS)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, IDS), separate, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), logits(build("mamba2"), IDS))
    with pytest.raises(ValueError, match="'default' is merged already"):
        model.merge_adapter(["wide"])
    with pytest.raises(RuntimeError, match="merged"):
        model.train()(input_ids=IDS)
    model.unmerge_adapter()
    assert torch.equal(logits(model, IDS), separate)
    # One that is not active can be merged, and the active one stays active.
    model.merge_adapter(["wide"])
    layer = layers(model)[0]
    assert layer.merged_adapters == ["wide"]
    with layer.reading("wide"):
        expected = layer.adapted_weight()
    x = torch.randn(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), nn.functional.linear(x, expected))
    model.unmerge_adapter()
    assert torch.equal(logits(model, IDS), separate)


def test_a_merge_follows_what_is_loaded() -> None:
    model, other = adapted(), adapted()
    move(other, "default", seed=7)
    model.merge_adapter()
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(logits(model, IDS), logits(other, IDS), rtol=1e-4, atol=1e-5)


def test_quantised_bases_merge_into_dense_models() -> None:
    model = build("mamba2")
    quantize_model(model, "int8")
    quantised = {p for p, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    model = get_peft_model(model, config(target_modules=["in_proj"], n_blocks=None))
    move(model, "default")
    expected = logits(model, IDS)
    merged = model.merge_and_unload()
    assert {type(merged.get_submodule(path)) for path in quantised} == {nn.Linear}
    torch.testing.assert_close(logits(merged, IDS), expected, rtol=1e-4, atol=1e-5)


def test_merging_writes_the_adapter_that_is_named() -> None:
    model = two()
    model.set_adapter("wide")
    wide = logits(model, IDS)
    model.set_adapter("default")
    merged = model.merge_and_unload(adapter_names=["wide"])
    torch.testing.assert_close(logits(merged, IDS), wide, rtol=1e-4, atol=1e-5)


def test_a_broken_adapter_is_not_merged_safely() -> None:
    model = adapted()
    layers(model)[0].factors("prodial_A")["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="not finite"):
        model.merge_and_unload(safe_merge=True)


def test_two_at_once_are_refused() -> None:
    model = two()
    before = logits(model, IDS)
    with pytest.raises(ValueError, match="one ProDiaL adapter can be active at a time"):
        model.base_model.set_adapter(["default", "wide"])
    with pytest.raises(ValueError, match="one ProDiaL adapter can be active"):
        model.merge_and_unload(adapter_names=["default", "wide"])
    with pytest.raises(ValueError, match=r"adapter_names.*is not supported"):
        model(input_ids=IDS, adapter_names=["default", "wide"])
    assert torch.equal(logits(model, IDS), before)


def test_a_mixed_model_is_refused() -> None:
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(build("mamba2"), config(), mixed=True)


def test_copies_and_pickles() -> None:
    model = two()
    expected = logits(model, IDS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, IDS), expected)
        move(twin, "default", seed=9)
        assert torch.equal(logits(model, IDS), expected)
        assert not torch.equal(logits(twin, IDS), expected)


# --- What a configuration means. ----------------------------------------------------------------


def test_patterns_give_layers_their_own_ranks_and_blocks() -> None:
    model = adapted(
        r=4,
        rank_pattern={"out_proj": 2, r"layers\.1\.mixer\.in_proj": 3},
        alpha_pattern={"out_proj": 6},
        n_blocks={"in_proj": 8, r"layers\.0\.mixer\.out_proj": 4},
        train_scale=False,
        diagonal="free",
        lora_dropout=0.1,
    )
    found = {path: layer for path, layer in model.get_base_model().named_modules()
             if layer in set(layers(model))}  # fmt: skip
    described = {
        path.removeprefix("backbone."): (m.r, m.lora_scaling, len(m.prodial_blocks))
        for path, m in found.items()
    }
    assert described == {
        "layers.0.mixer.in_proj": (4, 1.0, 8),
        "layers.0.mixer.out_proj": (2, 3.0, 4),
        "layers.1.mixer.in_proj": (3, 1.0, 8),
        "layers.1.mixer.out_proj": (2, 3.0, 32),
    }
    for layer in layers(model):
        assert layer.prodial_scale is None
        assert (layer.diagonal, layer.lora_dropout) == ("free", 0.1)


def test_layers_and_exclusions() -> None:
    options = {"n_blocks": None, "layers_to_transform": [1], "layers_pattern": "layers"}
    model = adapted(exclude_modules=["out_proj"], **options)
    assert model.targeted_module_names == ["backbone.layers.1.mixer.in_proj"]


def test_the_report_counts_the_active_adapter() -> None:
    model = two()
    report = adapter_report(model)
    assert [row.count for row in report.rows] == [2, 2]
    assert [row.r for row in report.rows] == [2, 2]
    assert sum(row.trainable for row in report.rows) == report.trainable
    assert report.trainable == model.get_nb_trainable_parameters()[0]


def test_a_preset_as_a_peft_configuration() -> None:
    own = ProdialConfig(r=8, lora_alpha=8, lora_dropout=0.1, n_blocks={"in_proj": 4, "out_proj": 4})
    found = ProdialPeftConfig.from_prodial(own, task_type="CAUSAL_LM")
    for name in ("in_proj", "out_proj"):
        layer = found.for_layer(f"backbone.layers.0.mixer.{name}")
        assert (layer.r, layer.lora_alpha, layer.lora_dropout) == (8, 8, 0.1)
        assert layer.n_blocks == 4
    assert (found.target_modules, found.task_type) == ({"in_proj", "out_proj"}, "CAUSAL_LM")


REFUSED = {
    "a block count": ({"n_blocks": 5}, "n_blocks=5 must divide in_features=16"),
    "a name of blocks": ({"n_blocks": {"q_proj": 2}}, "match none of the targets"),
    "a convolution": ({"target_modules": ["conv1d"], "n_blocks": None}, "not an nn.Linear"),
    "nothing": ({"target_modules": ["q_proj"], "n_blocks": None}, "not found in the base model"),
    "a saved module": ({"modules_to_save": ["head"]}, "modules_to_save='head' matches no module"),
    "LoRA on a mixer": (
        {"target_modules": ["in_proj"], "n_blocks": None,
             "lora": LoraConfig(target_modules=["out_proj"])},
        "may read its weight instead",
    ),
    "LoRA on the same": ({"lora": LoraConfig(target_modules=["in_proj"])}, "take it out of one"),
    "LoRA nowhere": ({"lora": LoraConfig(target_modules=["x"])}, "matches nothing"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_model_as_it_was(case: str) -> None:
    options, message = REFUSED[case]
    if "lora" in options and not MIXES_METHODS:
        message = "LoRA beside ProDiaL needs PEFT 0.21"
    model = build("mamba2")
    modules = {path: type(module) for path, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config(**options))
    assert {path: type(module) for path, module in model.named_modules()} == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
    # And nothing keeps it from being adapted rightly.
    assert layers(get_peft_model(model, config()))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": -1}, ValueError, "r must be >= 0"),
        ({"rank_pattern": {"in_proj": "8"}}, TypeError, "r must be an integer"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout"),
        ({"diagonal": "full"}, ValueError, "diagonal must be one of"),
        ({"n_blocks": 2, "block_size": 2}, ValueError, "not both"),
        ({"r": 0, "train_scale": False, "train_diagonal": False}, ValueError, "nothing would be"),
        ({"target_modules": "all-linear"}, ValueError, "all-linear.* is not supported"),
        ({"target_modules": r"(\w+\w*)+_proj"}, ValueError, "may take for ever"),
        (
            {"rank_pattern": {r"(\w+\w*)+_proj": 2}},
            ValueError,
            "^key of rank_pattern='.*' may take for ever",
        ),
        (
            {"target_modules": "in_proj,out_proj"},
            ValueError,
            "commas in between.*give each by itself: 'in_proj' 'out_proj'",
        ),
        ({"exclude_modules": ["in_proj, x_proj"]}, ValueError, "exclude_modules holds names with"),
        ({"layers_pattern": "layers"}, ValueError, "give layers_to_transform"),
        ({"target_modules": ".*in_proj", "layers_to_transform": [0]}, ValueError, "list of names"),
        ({"lora": LoraConfig()}, ValueError, "lora.target_modules must name"),
        ({"lora": LoraConfig(target_modules="all-linear")}, ValueError, "must name the layers"),
        ({"lora": {"target_modules": ["q"], "bias": "all"}}, ValueError, "lora.bias"),
        (
            {"lora": {"target_modules": ["q"], "init_lora_weights": "pissa"}},
            ValueError,
            "changes the base model",
        ),
    ],
)
def test_refused_configurations(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ProdialPeftConfig(**options)


def test_a_model_that_apply_prodial_adapted_is_refused() -> None:
    model = build("mamba2")
    apply_prodial(model, ProdialConfig(r=2))
    with pytest.raises(ValueError, match="adapted by apply_prodial already"):
        get_peft_model(model, config())
    assert any(p.requires_grad for p in model.parameters())


def test_the_packages_own_functions_send_to_pefts() -> None:
    model = two()
    for mine in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="call the PeftModel's own functions"):
            set_adapter(mine, "wide")


def test_a_second_name_is_refused() -> None:
    model = build("mamba2")
    model.kept = [model.backbone.layers[1].mixer.out_proj.weight]
    with pytest.raises(ValueError, match="under a second name"):
        get_peft_model(model, config())


def test_a_failed_second_adapter_leaves_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(target_modules=["in_proj"], n_blocks=4)
    before = logits(model, IDS)
    tuner = type(model.base_model)
    create = tuner._create_and_replace

    def fail_late(self: nn.Module, *args: object, **kwargs: object) -> None:
        create(self, *args, **kwargs)
        if kwargs["current_key"].endswith("1.mixer.out_proj"):
            raise KeyboardInterrupt

    monkeypatch.setattr(tuner, "_create_and_replace", fail_late)
    with pytest.raises(KeyboardInterrupt):
        model.add_adapter("second", config())
    monkeypatch.undo()
    assert len(layers(model)) == 2
    assert torch.equal(logits(model, IDS), before)
    assert [p for p in model.parameters() if p.requires_grad]


# --- Weighted combinations. ---------------------------------------------------------------------


COMBINABLE = {
    "LoRA": [{"train_scale": False, "train_diagonal": False}] * 2,
    "LoRA of several ranks": [
        {"train_scale": False, "train_diagonal": False, "r": r, "lora_alpha": 4} for r in (1, 3)
    ],
    "LoRA, and elsewhere": [
        {"train_scale": False, "train_diagonal": False},
        {"train_scale": False, "train_diagonal": False, "target_modules": ["out_proj"]},
    ],
    "scales": [{"train_diagonal": False}, {"train_diagonal": False, "r": 0}],
    "blocks": [{"train_scale": False, "block_size": 4}] * 2,
    "free blocks": [
        {"train_scale": False, "block_size": 4, "diagonal": "free"},
        {"train_scale": False, "block_size": 4},
    ],
}


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.5, -0.5]])
@pytest.mark.parametrize("case", COMBINABLE)
def test_a_combination_is_the_weighted_sum(case: str, weights: list[float]) -> None:
    first, second = COMBINABLE[case]
    model = adapted(**{"n_blocks": None, **first})
    model.add_adapter("second", config(**{"n_blocks": None, **second}))
    move(model, "second", seed=4)
    model.add_weighted_adapter(["default", "second"], weights, "both")
    assert model.active_adapters == ["default"]
    assert model.peft_config["both"].peft_type == "PRODIAL"
    for layer in layers(model):
        base = layer.base_layer.weight
        expected = base.clone()
        for name, weight in zip(["default", "second"], weights, strict=True):
            if name in layer._prodial_options:
                with layer.reading(name):
                    expected += weight * (layer.effective_weight() - base)
        with layer.reading("both"):
            torch.testing.assert_close(layer.effective_weight(), expected, rtol=1e-5, atol=1e-6)
            assert not torch.allclose(expected, base, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "second", "message"),
    [
        ({}, {}, "not defined: W' = s ⊙"),
        ({"train_scale": False}, {"train_diagonal": False}, "is not defined"),
        (
            {"train_scale": False, "block_size": 2},
            {"train_scale": False, "block_size": 4},
            "blocks of sides",
        ),
        (
            {"train_diagonal": False, "modules_to_save": ["lm_head"]},
            {"train_diagonal": False},
            "has modules_to_save",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_what_has_no_sum_is_refused(options: dict, second: dict, message: str) -> None:
    model = adapted(**{"n_blocks": None, **options})
    model.add_adapter("second", config(**{"n_blocks": None, **second}))
    before = logits(model, IDS)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")
    assert set(model.peft_config) == {"default", "second"}
    assert torch.equal(logits(model, IDS), before)


def test_only_the_combination_that_is_the_sum() -> None:
    model = adapted(n_blocks=None, train_scale=False, train_diagonal=False)
    for arguments, message in (
        ((["default"], [1.0], "x", "svd"), 'must be "cat"'),
        ((["default"], [1.0, 2.0], "x"), "one weight for each"),
        ((["other"], [1.0], "x"), "adapters are"),
        ((["default"], [1.0], "default"), "adapters are"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(*arguments)


@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.parametrize("targets", ["mixer", ["attention", "mixer"], "auto"])
def test_parts_of_a_model_as_targets(targets: Any, tmp_path: Path) -> None:
    """The file names layers, so that what a part means later does not matter."""
    model = get_peft_model(build("bamba"), ProdialPeftConfig(r=2, target_modules=targets))
    names = {path.rpartition(".")[2] for path, module in model.named_modules()
             if isinstance(module, ProdialPeftLinear)}  # fmt: skip
    mixer, attention = {"in_proj", "out_proj"}, {"q_proj", "k_proj", "v_proj", "o_proj"}
    mlp = {"gate_proj", "up_proj", "down_proj"}
    expected = {"mixer": mixer, "auto": mixer | attention | mlp}
    assert names == (expected[targets] if isinstance(targets, str) else mixer | attention)
    model.save_pretrained(tmp_path)
    assert {*ProdialPeftConfig.from_pretrained(str(tmp_path)).target_modules} == names
