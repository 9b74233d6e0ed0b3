"""Options: presets, defaults, what is refused, and files that hold them."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from prodial_kernels.config import PRESETS
from prodial_kernels.files import reading
from prodial_kernels.training.config import DEFAULT_LR, ConfigError, FinetuneConfig, ResolvedConfig
from prodial_kernels.training.config_file import read_config_file
from prodial_kernels.training.run.directory import (
    RunDirectory,
    RunError,
    RunIdentity,
    check_same_config,
)
from prodial_kernels.upstream import MissingExtraError


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
    assert FinetuneConfig.from_dict(json.loads(json.dumps(once.to_dict()))).resolved() == once


def test_a_resolved_configuration_lacks_nothing() -> None:
    values = FinetuneConfig().resolved().to_dict()
    with pytest.raises(ConfigError, match="lr must be a number, got None"):
        ResolvedConfig(**{**values, "lr": None})


def test_the_length_of_a_run_is_counted_in_optimizer_steps() -> None:
    assert FinetuneConfig(steps=7).resolved().optimizer_steps(100) == 7
    config = FinetuneConfig(epochs=0.5, grad_accumulation=4).resolved()
    assert config.optimizer_steps(101) == 13


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
        ({"lr": float("nan")}, "lr must be a number, got nan"),
        ({"batch_size": "8"}, "batch_size must be a whole number, got '8'"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing must be true or false"),
        ({"target_modules": 3}, "target_modules must be a string or a list"),
        ({"held_out_fraction": 1.0}, "held_out_fraction must lie between"),
        ({"method": "full", "r": 8}, "no adapter: leave out r, or"),
        ({"learning_rate": 1e-3}, r"unknown keys \['learning_rate'\]; .*did you mean 'lr'\?$"),
        (
            {"batch-size": 4, "what": 1},
            "'batch-size': did you mean 'batch_size'.*; known are",
        ),
        ({"n_blocks": {"in_proj": {}}}, "n_blocks for 'in_proj' must be a whole number, got {}"),
        ({"n_blocks": [4]}, "n_blocks must be a whole number, or one for each target"),
        ({"n_blocks": 4, "block_size": 4}, "give n_blocks or block_size, not both"),
        ({"lr": 10**400}, "lr must be at most 100, got a number of about 401 digits"),
        ({"lr": 1e308}, "lr must be at most 100"),
        ({"epochs": 1e308}, "epochs must be at most"),
        ({"seed": 2**64}, "seed must be at most"),
        ({"seed": -(2**63) - 1}, "seed must be at least"),
        ({"lora_alpha": -1e308}, "lora_alpha must be at least"),
        ({"r": 10**9}, "r must be at most 65536"),
        ({"batch_size": 10**6, "seq_len": 512}, "batch_size 1,000,000 × seq_len 512 × grad_accum"),
        ({"grad_accumulation": 10**9}, "grad_accumulation must be at most"),
        ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and less than 1, got 1.0"),
        ({"r": 0, "method": "lora"}, "nothing would be trained: r is 0"),
        ({"lora_alpha": 0}, "lora_alpha 0 multiplies A and B by 0"),
        ({"lora_alpha": 0.0, "method": "lora"}, "they would learn nothing: leave it out"),
        ({"model": " "}, "model must not be empty"),
        ({"modules_to_save": 3}, "modules_to_save must be a string or a list of strings"),
        ({"memory_budget": "8"}, "memory_budget: '8' is 8 bytes.*did you mean '8GB'"),
        ({"memory_budget": "9" * 400 + "GB"}, "memory_budget: expected a size"),
        ({"method": "prodail"}, "got 'prodail'; did you mean 'prodial'"),
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


def test_yaml_files(tmp_path: Path) -> None:
    text = """\
    # As people write them: 3e-4 is a number, off a word, 010 ten.
    lr: 3e-4
    cuda_graph: off
    steps: 010
    n_blocks: {in_proj: 4}
    target_modules:
      - in_proj
    preset: null
    train_scale: false
    memory_budget: 8GB
    """
    (tmp_path / "a.yaml").write_text(text)
    values = read_config_file(tmp_path / "a.yaml")
    assert values == {
        "lr": 3e-4, "cuda_graph": "off", "steps": 10, "n_blocks": {"in_proj": 4},
        "target_modules": ["in_proj"], "preset": None, "train_scale": False,
        "memory_budget": "8GB",
    }  # fmt: skip
    (tmp_path / "b.yml").write_text(json.dumps(values))
    assert read_config_file(tmp_path / "b.yml") == values
    assert FinetuneConfig.from_dict(values).lr == 3e-4


def test_yaml_without_its_library_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.yaml").write_text("lr: 1")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingExtraError, match=r'yaml, not .*"prodial-kernels\[cli\]"'):
        read_config_file(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "lr: 1\nlr: 2", r"a\.yaml: not valid YAML: line 2: 'lr' is given twice"),
        ("a.yaml", "lr: &one 1\nclip: *one", r"a\.yaml: not valid YAML: line 2: \*one stands for"),
        ("a.yaml", "lr: !!python/name:os.system", r"a\.yaml: not valid YAML: could not"),
        ("a.yaml", "lr: [", r"a\.yaml: not valid YAML: while parsing"),
        ("a.yaml", "lr: fast", r"a\.yaml: lr must be a number, got 'fast'"),
        ("a.yaml", "- lr", r"a\.yaml: expected options by name"),
        ("a.yaml", "", r"a\.yaml: expected options by name"),
        ("a.yaml", "[" * 100_000, r"a\.yaml: nested too deeply"),
        ("a.yml", "report_to: [tensorbord]", r"a\.yml: report_to must .*mean 'tensorboard'"),
        ("a.json", "{", "not valid"),
        ("a.json", "[1]", "expected options by name"),
        ("a.json", '{"stepz": 3}', r"a\.json: unknown keys \['stepz'\]"),
        ("a.json", '{"batch_size": "two"}', r"a\.json: batch_size must be a whole number, got"),
        ("a.json", '{"lr": 1, "lr": 2}', r"a\.json: not valid JSON .*'lr' is given twice"),
        ("a.json", "[" * 100_000, r"a\.json: nested too deeply"),
        ("a.toml", "lr = " + "[" * 100_000, r"a\.toml: "),
        ("a.json", '{"steps": ' + "1" * 5000 + "}", r"a\.json: not valid JSON"),
        ("a.json", "steps = 5", r"a\.json: not valid JSON \(or name it \.toml or \.yaml\)"),
        ("missing.json", None, "missing.json: no such file"),
    ],
)
def test_files_that_cannot_be_used(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config_file(tmp_path / name)


def test_a_runs_record_is_a_config_file(tmp_path: Path) -> None:
    config = FinetuneConfig(output="there", steps=7).resolved().to_dict()
    (tmp_path / "run.json").write_text(json.dumps({"format_version": 1, "config": config}))
    values = read_config_file(tmp_path / "run.json")
    assert values["steps"] == 7
    assert "output" not in values
    assert FinetuneConfig.from_dict(values).resolved().lr == config["lr"]


def test_what_never_ends_is_no_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="/dev/zero: cannot be read: it is a device"):
        read_config_file("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(reading, "SILENT_PIPE_SECONDS", 0.01)
    with pytest.raises(ConfigError, match="pipe through which nothing came"):
        read_config_file(tmp_path / "pipe")


def test_a_run_of_a_version_with_fewer_options_can_be_resumed(tmp_path: Path) -> None:
    config = FinetuneConfig(steps=7).resolved()
    older = config.to_dict()
    del older["cuda_graph"], older["packing"], older["modules_to_save"]
    saved = RunIdentity(config=older, model="", data="", held_out="", device="cpu")
    check_same_config(RunDirectory(tmp_path), saved, config)
    with pytest.raises(RunError, match=r"packing \(run: 'stream', now: 'documents'\)"):
        check_same_config(
            RunDirectory(tmp_path), saved, dataclasses.replace(config, packing="documents")
        )


def test_errors_can_name_flags() -> None:
    with pytest.raises(ConfigError) as caught:
        FinetuneConfig(steps=5, epochs=1.0)
    assert caught.value.renamed(str.upper) == "give STEPS or EPOCHS, not both (got 5 and 1)"


def test_other_adapter_options_reach_the_adapter() -> None:
    config = FinetuneConfig(modules_to_save=["head"], allow_partial=True).resolved()
    assert config.adapter().modules_to_save == ("head",)
    assert config.adapter().allow_partial
    assert FinetuneConfig(method="lora", allow_partial=True).reference_adapter().allow_partial
    # A run of an earlier version does not know them: not given, they stay so.
    assert FinetuneConfig().resolved().modules_to_save is None
