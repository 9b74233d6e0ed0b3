"""Options: presets, defaults, what is refused, and files that hold them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from prodial_kernels.cli_options import LANGUAGE_PRESETS
from prodial_kernels.config import PRESETS
from prodial_kernels.training.config import DEFAULT_LR, ConfigError, FinetuneConfig
from prodial_kernels.training.config_file import read_config_file


def test_a_preset_fills_in_the_adapter_and_the_training() -> None:
    config = FinetuneConfig(preset="arc-easy").resolved()
    assert (config.lr, config.schedule, config.batch_size, config.seq_len) == (
        5e-6,
        "constant",
        4,
        512,
    )
    assert config.adapter() == PRESETS["arc-easy"].adapter


def test_options_win_over_the_preset() -> None:
    config = FinetuneConfig(preset="arc-easy", r=4, lr=1e-3, block_size=2).resolved()
    adapter = config.adapter()
    assert (config.lr, adapter.r, adapter.block_size, adapter.n_blocks) == (1e-3, 4, 2, None)
    assert adapter.lora_dropout == 0.1


def test_other_targets_do_not_inherit_the_presets_blocks() -> None:
    adapter = FinetuneConfig(preset="arc-easy", target_modules=("x_proj",)).adapter()
    assert adapter.n_blocks is None


@pytest.mark.parametrize("method", ["prodial", "lora", "full"])
@pytest.mark.parametrize("preset", [None, "hellaswag"])
def test_resolving_twice_changes_nothing(method: str, preset: str | None) -> None:
    once = FinetuneConfig(method=method, preset=preset).resolved()
    assert once.resolved() == once
    assert FinetuneConfig.from_dict(json.loads(json.dumps(once.to_dict()))) == once


def test_each_method_has_its_own_learning_rate() -> None:
    for method, lr in DEFAULT_LR.items():
        assert FinetuneConfig(method=method).resolved().lr == lr


def test_lora_is_only_a_and_b_with_alpha_one() -> None:
    adapter = FinetuneConfig(method="lora", preset="arc-easy").adapter(r=19)
    assert (adapter.train_scale, adapter.train_diagonal) == (False, False)
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (19, 19.0, 0.1)


def test_epochs_replace_steps() -> None:
    assert FinetuneConfig(epochs=0.5).resolved().steps is None
    assert FinetuneConfig().resolved().steps is not None


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").touch()
    monkeypatch.chdir(tmp_path)
    config = FinetuneConfig(data="text.txt", model="some/hub-id").resolved()
    assert config.data == str(tmp_path / "text.txt")
    assert config.model == "some/hub-id"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "arc-hard"}, "preset must be one of .*'arc-easy'"),
        ({"preset": "vim-cars"}, "image classification"),
        ({"method": "dora"}, "method must be one of 'prodial', 'lora', 'full'"),
        ({"schedule": "step"}, "schedule must be one of"),
        ({"steps": 5, "epochs": 1.0}, "not both"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be float"),
        ({"batch_size": "8"}, "batch_size must be int"),
        ({"batch_size": True}, "batch_size must be int"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing must be bool"),
        ({"target_modules": 3}, "target_modules must be a string or a list"),
        ({"held_out_fraction": 1.0}, "held_out_fraction must lie between"),
        ({"method": "full", "r": 8}, r"no adapter: drop \['r'\]"),
        ({"learning_rate": 1e-3}, r"unknown keys \['learning_rate'\].*'lr'"),
    ],
)
def test_refusals_name_the_option(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FinetuneConfig.from_dict(values)


def test_json_and_toml_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"lr": 0.01, "target_modules": ["in_proj"]}')
    assert read_config_file(tmp_path / "a.json") == {"lr": 0.01, "target_modules": ["in_proj"]}
    (tmp_path / "a.toml").write_text("lr = 0.01\n[n_blocks]\nin_proj = 4\n")
    if sys.version_info >= (3, 11):
        assert read_config_file(tmp_path / "a.toml") == {"lr": 0.01, "n_blocks": {"in_proj": 4}}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "not valid"),
        ("a.json", "[1]", "expected options by name"),
        ("a.json", '{"stepz": 3}', r"a\.json: unknown keys \['stepz'\]"),
        ("missing.json", None, "cannot be read: No such file"),
    ],
)
def test_files_that_cannot_be_used(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config_file(tmp_path / name)


def test_the_help_lists_every_preset_for_language() -> None:
    language = {name for name, preset in PRESETS.items() if preset.seq_len is not None}
    assert set(LANGUAGE_PRESETS) == language
