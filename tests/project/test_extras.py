"""What works with torch, triton and safetensors alone, and what the rest says is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prodial_kernels.cli import commands
from prodial_kernels.training import FinetuneConfig, finetune
from prodial_kernels.training.adapted import load_adapted
from prodial_kernels.upstream import CLI, MissingExtraError, require_extra

ROOT = Path(__file__).resolve().parents[2]
LAYER_ALONE = ROOT / "tests" / "support" / "layer_alone.py"
ADVICE = r'pip install "prodial-kernels\[cli\]"'


def test_layers_and_adapters_need_torch_and_safetensors_alone(tmp_path: Path) -> None:
    command = [sys.executable, str(LAYER_ALONE), str(tmp_path / "adapter")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(params=CLI)
def missing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, request.param, None)
    return str(request.param)


def test_what_is_missing_is_named_with_the_extra(missing: str, tmp_path: Path) -> None:
    config = FinetuneConfig(output=str(tmp_path / "run"))
    with pytest.raises(MissingExtraError, match=rf"^finetune\(\) needs {missing}, .*: {ADVICE}$"):
        finetune(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", sorted(commands.COMMANDS))
def test_commands_say_what_to_install(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for library in CLI:
        monkeypatch.setitem(sys.modules, library, None)
    arguments = {
        "merge": ["--adapter", "a", "--output", "b"],
        "inspect": ["a"],
        "convert": ["a", "--to", "peft", "--output", "b"],
    }
    assert commands.main([command, *arguments.get(command, [])]) == 1
    assert capsys.readouterr().err == (
        f"prodial: error: prodial {command} needs transformers, tqdm, matplotlib, not installed "
        'here: pip install "prodial-kernels[cli]"\n'
    )


def test_a_model_is_loaded_by_transformers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert load_adapted(device="cpu").name == "embedded"
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=f"^loading a model needs transformers, .*{ADVICE}"):
        load_adapted(device="cpu")


def test_nothing_is_raised_where_all_are_installed() -> None:
    require_extra("this test")
