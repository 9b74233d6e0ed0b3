"""``ProdialConfig``: JSON, what matches, blocks per target, every error, and the presets."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from prodial_kernels import BitFit, ProdialConfig
from prodial_kernels.config import PRESETS, get_preset

EVERYTHING = ProdialConfig(
    r=3, lora_alpha=5, lora_dropout=0.25, target_modules=["in_proj", "x_proj"],
    block_size={"in_proj": 6}, diagonal="free", train_scale=False, train_diagonal=True,
    modules_to_save=["head"], allow_partial=True, impl="reference",
)  # fmt: skip


@pytest.mark.parametrize("config", [ProdialConfig(), EVERYTHING,
                                    *(preset.adapter for preset in PRESETS.values())])  # fmt: skip
def test_json_round_trip(config: ProdialConfig) -> None:
    assert ProdialConfig.from_json(config.to_json()) == config
    assert ProdialConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    # Earlier versions read the files of configurations without methods.
    names = {field.name for field in dataclasses.fields(ProdialConfig)}
    assert json.loads(config.to_json()).keys() == (names if config.methods else names - {"methods"})


def test_json_is_stable_and_minimal_files_get_the_defaults() -> None:
    assert EVERYTHING.to_json() == ProdialConfig.from_json(EVERYTHING.to_json()).to_json()
    assert ProdialConfig.from_json("{}") == ProdialConfig()
    assert ProdialConfig.from_json('{"r": 8}') == ProdialConfig(r=8)


def test_defaults() -> None:
    config = ProdialConfig()
    assert config.target_modules == ("in_proj", "out_proj")
    assert config.lora_alpha == 16.0
    assert ProdialConfig(r=8).lora_alpha == 8.0
    assert config.diagonal == "relu"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 3  # type: ignore[misc]


def test_mappings_are_copied() -> None:
    blocks = {"in_proj": 4}
    config = ProdialConfig(n_blocks=blocks)
    blocks["in_proj"] = 8
    assert config.blocks_of("in_proj") == {"n_blocks": 4, "block_size": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the configuration is not valid JSON"),
        ("[" * 100_000, "the configuration is not valid JSON: maximum recursion"),
        ("", "the configuration is not valid JSON"),
        ("[1]", "the configuration must be an object, got list"),
        ("null", "the configuration must be an object, got NoneType"),
        ('{"rank": 8, "alpha": 1}', r"unknown configuration keys \['alpha', 'rank'\]; known are"),
    ],
)
def test_bad_json(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProdialConfig.from_json(text)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": -1}, ValueError, r"r must be >= 0 .*, got -1"),
        ({"r": 2.5}, TypeError, r"r must be an integer, got 2\.5"),
        ({"r": "8"}, TypeError, r"r must be an integer, got '8'"),
        ({"r": True}, TypeError, r"r must be an integer, got True"),
        ({"r": 10**400}, ValueError, "r must be a finite number"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha must be a finite .*, got nan"),
        ({"lora_alpha": float("-inf")}, ValueError, "lora_alpha must be a finite .*, got -inf"),
        ({"lora_alpha": 1e308}, ValueError, r"lora_alpha must be .* at most 3\.4e\+38 .*1e\+308"),
        ({"lora_alpha": 10**400}, ValueError, "lora_alpha must be a finite .*, got a larger one"),
        ({"lora_alpha": True}, TypeError, "lora_alpha must be a number, got True"),
        ({"lora_dropout": float("nan")}, ValueError, "lora_dropout must be in .*, got nan"),
        ({"n_blocks": True}, TypeError, "n_blocks must be an integer, .* got True"),
        ({"n_blocks": 0}, ValueError, "n_blocks must be >= 1, got 0"),
        ({"block_size": {"in_proj": -4}}, ValueError, "block_size must be >= 1, got -4"),
        ({"n_blocks": {1: 4}}, TypeError, "n_blocks given per target must have names as keys"),
        ({"lora_alpha": "8"}, TypeError, r"lora_alpha must be a number, got '8'"),
        ({"lora_dropout": None}, TypeError, r"lora_dropout must be a number, got None"),
        ({"lora_dropout": 1}, ValueError, r"lora_dropout must be in \[0, 1\), got 1"),
        ({"lora_dropout": -0.1}, ValueError, r"lora_dropout must be in \[0, 1\), got -0\.1"),
        ({"diagonal": "x"}, ValueError, "diagonal must be one of 'relu', 'free', got 'x'"),
        ({"impl": "x"}, ValueError, "impl must be one of 'auto', .*, got 'x'"),
        ({"train_scale": "false"}, TypeError, "train_scale must be true or false, got 'false'"),
        ({"train_diagonal": 1}, TypeError, "train_diagonal must be true or false, got 1"),
        ({"allow_partial": None}, TypeError, "allow_partial must be true or false, got None"),
        ({"n_blocks": 4, "block_size": 6}, ValueError, "give n_blocks or block_size, not both"),
        ({"n_blocks": "4"}, TypeError, "n_blocks must be an integer, .* got '4'"),
        ({"block_size": {"in_proj": 1.5}}, TypeError, r"block_size must be .* got 1\.5"),
        ({"n_blocks": {"in_proj": None}}, TypeError, "n_blocks must be an integer, .* got None"),
        ({"r": 0, "train_scale": False, "train_diagonal": False}, ValueError, "nothing would be"),
        ({"target_modules": "in_("}, ValueError, r"'in_\(' is not a regular expression: "),
        ({"target_modules": "a, b.c"}, ValueError, "'a, b.c'; give each by itself: 'a' 'b.c'"),
        ({"modules_to_save": ["a,b"]}, ValueError, "modules_to_save holds names with commas in be"),
        ({"target_modules": []}, ValueError, "must name at least one module, got none"),
        ({"target_modules": [1]}, TypeError, r"target_modules must be a list of names"),
        ({"target_modules": None}, TypeError, "target_modules must be a list of names .*got None"),
        ({"modules_to_save": "head"}, TypeError, "modules_to_save must be a list, got 'head'"),
        ({"modules_to_save": 3}, TypeError, "modules_to_save must be a list, got 3"),
        (
            {"n_blocks": {"x_proj": 4}},
            ValueError,
            r"n_blocks given per target must use names from target_modules=\('in_proj', "
            r"'out_proj'\), got \['x_proj'\]",
        ),
        (
            {"block_size": {"in_proj": 4}, "target_modules": ".*proj"},
            ValueError,
            "block_size given per target must use names from target_modules='.\\*proj'",
        ),
    ],
)  # fmt: skip
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ProdialConfig(**options)


@pytest.mark.parametrize(
    ("targets", "path", "expected"),
    [
        (["in_proj"], "layers.0.mixer.in_proj", "in_proj"),
        (["in_proj"], "in_proj", "in_proj"),
        (["in_proj"], "layers.0.mixer.main_in_proj", None),
        (["in_proj"], "layers.0.in_proj.weight", None),
        (["mixer.in_proj"], "layers.0.mixer.in_proj", "mixer.in_proj"),
        (["mixer.in_proj"], "layers.0.attention.in_proj", None),
        (["in.proj"], "layers.0.in_proj", None),
        (["out_proj", "in_proj"], "layers.0.in_proj", "in_proj"),
        (["mixer.in_proj", "in_proj"], "layers.0.mixer.in_proj", "mixer.in_proj"),
        (r".*\.(in|out)_proj", "layers.0.in_proj", r".*\.(in|out)_proj"),
        (r".*\.(in|out)_proj", "layers.0.in_proj.weight", None),
        ("in_proj", "layers.0.in_proj", "in_proj"),
        ("in_proj", "layers.0.main_in_proj", None),
        (r"in_pro.", "layers.0.in_proj", None),
        (r".*\.\w{2,3}_proj", "layers.0.in_proj", r".*\.\w{2,3}_proj"),
        (r"layers\.[02]\..*", "layers.1.in_proj", None),
        (r"layers\.[02]\..*", "layers.2.in_proj", r"layers\.[02]\..*"),
    ],
)  # fmt: skip
def test_target_matching(targets: Any, path: str, expected: str | None) -> None:
    """As PEFT: names match the end of a dotted path, a regular expression the whole of it."""
    assert ProdialConfig(target_modules=targets).target_of(path) == expected


def test_blocks_per_target() -> None:
    one = ProdialConfig(n_blocks=4)
    assert one.blocks_of("in_proj") == one.blocks_of("out_proj") == {
        "n_blocks": 4, "block_size": None,
    }  # fmt: skip
    two = ProdialConfig(block_size={"in_proj": 6, "out_proj": 12})
    assert two.blocks_of("in_proj") == {"n_blocks": None, "block_size": 6}
    assert two.blocks_of("out_proj") == {"n_blocks": None, "block_size": 12}
    some = ProdialConfig(n_blocks={"in_proj": 4})
    assert some.blocks_of("out_proj") == {"n_blocks": None, "block_size": None}
    assert ProdialConfig().blocks_of("in_proj") == {"n_blocks": None, "block_size": None}


def test_presets_are_the_papers() -> None:
    """Tables 9-11 and the released scripts."""
    assert set(PRESETS) == {
        "arc-easy", "arc-challenge", "hellaswag", "winogrande", "vim-caltech", "vim-cars",
        "vim-flowers",
    }  # fmt: skip
    arc = get_preset("arc-easy")
    assert (arc.adapter.r, arc.adapter.lora_alpha, arc.adapter.lora_dropout) == (8, 8, 0.1)
    assert arc.adapter.n_blocks == {"in_proj": 64, "out_proj": 64}
    assert (arc.learning_rate, arc.weight_decay, arc.batch_size, arc.seq_len) == (
        5e-6,
        0.01,
        4,
        512,
    )
    assert get_preset("arc-challenge").learning_rate == 1e-5
    hellaswag = get_preset("hellaswag")
    assert hellaswag.adapter.n_blocks == {"in_proj": 768, "out_proj": 1536}
    assert (hellaswag.adapter.r, hellaswag.learning_rate) == (16, 1e-4)
    assert get_preset("winogrande").adapter.r == 8
    flowers = get_preset("vim-flowers")
    assert flowers.adapter.n_blocks == {"in_proj": 16, "out_proj": 16}
    assert (flowers.learning_rate, flowers.weight_decay, flowers.schedule) == (5e-4, 0.1, "cosine")
    assert get_preset("vim-cars").adapter.n_blocks == {"in_proj": 192, "out_proj": 384}


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"preset must be one of 'arc-easy', .*, got 'arc'"):
        get_preset("arc")


def test_a_method_by_itself_is_no_list_of_methods() -> None:
    alone: Any = BitFit()
    with pytest.raises(TypeError, match="methods must be a list, got one BitFit"):
        ProdialConfig.of(alone)
