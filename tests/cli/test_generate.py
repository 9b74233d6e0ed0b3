"""``prodial generate``: text on standard output, all else beside it, and what it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from prodial_kernels.cli.commands import main
from prodial_kernels.cli.conversation import show
from prodial_kernels.models.loading.load import load_model
from prodial_kernels.training.generating import Sampling, generate
from support.tiny_run import run

_SHORT = ["--max-new-tokens", "12", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    run(place, place / "run", steps=6)
    return place / "run"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Type lines on a terminal."""

    def typed(text: str) -> None:
        stream = io.StringIO(text)
        stream.isatty = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr("sys.stdin", stream)

    return typed


def written(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["generate", *arguments, *_SHORT]) == 0
    printed = capsys.readouterr()
    return printed.out, printed.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["generate", *arguments]) == 1
    return capsys.readouterr().err


def test_adapter_and_merged_model_write_the_same(
    place: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ["--prompt", "The house"]
    by_adapter, said = written(capsys, "--adapter", str(trained), *prompt)
    merged, _ = written(capsys, "--model", str(trained / "merged"), *prompt)
    base, _ = written(capsys, "--model", str(place / "model"), *prompt)
    assert by_adapter == merged != base
    assert "9 tokens read, 12 written" in said
    assert "projectors run by" in said


def test_standard_input_and_json(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ["--model", str(place / "model")]
    expected, _ = written(capsys, *model, "--prompt", "The house")
    monkeypatch.setattr("sys.stdin", io.StringIO("The house"))
    out, _ = written(capsys, *model, "--json")
    found = json.loads(out)
    assert found["text"] + "\n" == expected
    assert found["prompt"] == "The house"
    assert len(found["tokens"]) == 12


def test_a_conversation_reads_every_turn_anew(
    place: Path, tmp_path: Path, terminal: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    loaded = load_model(str(place / "model"), device=torch.device("cpu"), dtype=torch.float32)
    loaded.model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    terminal("hi\nand?\n\n")
    out, _ = written(capsys, "--model", str(tmp_path), "--chat", "--system", "be brief")
    first = generate(loaded.model, tokenizer, "s:be brief;u:hi;", Sampling(12)).text
    second = generate(
        loaded.model, tokenizer, f"s:be brief;u:hi;a:{first};u:and?;", Sampling(12)
    ).text
    assert out == f"> {first}\n> {second}\n> "
    alone, _ = written(
        capsys, "--model", str(tmp_path), "--chat", "--system", "be brief", "--prompt", "hi"
    )
    assert alone == first + "\n"


def test_what_has_no_effect_or_no_text_is_refused(
    place: Path, terminal: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(place / "model")]
    terminal("")
    assert "nothing to go on with: give --prompt" in refused(capsys, *model)
    assert "nothing to go on with" in refused(capsys, *model, "--chat", "--json")
    assert "--system would have no effect" in refused(capsys, *model, "--system", "a")
    assert "no chat template" in refused(capsys, *model, "--chat", "--prompt", "hi")
    # Before anybody types a word.
    terminal("hi\n")
    assert "no chat template" in refused(capsys, *model, "--chat")
    assert "--top-p 0.5 would have no effect at temperature 0" in refused(
        capsys, *model, "--prompt", "hi", "--top-p", "0.5"
    )


def test_a_terminal_does_not_obey_what_a_model_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    show("\x1b[2J\ta\u00a0b\n")
    assert capsys.readouterr().out == "\x1b[2J\ta\u00a0b\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show("\x1b[2J\x9b\ta\u00a0b\n")
    assert capsys.readouterr().out == "\\x1b[2J\\x9b\ta\u00a0b\n"
