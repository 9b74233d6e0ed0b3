"""What the README shows works: its Python runs, its commands parse, its files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from prodial_kernels.cli import commands

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_python_blocks_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = code_blocks("python")
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert "in_proj" in capsys.readouterr().out  # the report
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
    assert type(names["plain"]).__name__ == "Linear"


def test_prodial_commands_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        line
        for block in code_blocks("bash")
        for line in block.splitlines()
        if line.startswith("prodial ")
    ]
    assert len(lines) >= 5
    for line in lines:
        _, command, *options = shlex.split(line, comments=True)
        ran: list[str] = []
        entry = commands._COMMANDS[command]
        stub = entry._replace(run=lambda _, ran=ran: ran.append("ran") or 0)
        monkeypatch.setitem(commands._COMMANDS, command, stub)
        assert commands.main([command, *options]) == 0, line
        assert ran, line


def test_local_links_exist() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_ci_runs_the_readme_test_command() -> None:
    commands = [block.strip() for block in code_blocks("bash") if "pytest" in block]
    assert len(commands) == 1
    assert "\n" not in commands[0]
