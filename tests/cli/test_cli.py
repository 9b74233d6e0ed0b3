"""The command line: help without waiting, each command on a tiny model, errors in one line."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import prodial_kernels
from prodial_kernels.cli.commands import main
from prodial_kernels.cli.messages import in_flags
from prodial_kernels.cli.options import add_finetune_options, config_values
from prodial_kernels.cli.paths import PathError, adapter_directory
from prodial_kernels.training.config import FinetuneConfig

_ON_TEXT = ["finetune", "--model", "MODEL", "--data", "TEXT"]
_FAST = ["--steps", "6", "--batch-size", "4", "--seq-len", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def run_folder(place: Path) -> Path:
    arguments = ["finetune", "--model", str(place / "model"), "--data", str(place / "text.txt")]
    assert main([*arguments, *_FAST, "--output", str(place / "run")]) == 0
    return place / "run"


def _error(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 1) -> str:
    """Run a command that must fail; return its message, which is one line without a traceback."""
    capsys.readouterr()
    try:
        status = main(arguments)
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    assert status == code
    lines = capsys.readouterr().err.strip().splitlines()
    messages = [line for line in lines if line.startswith("prodial: error: ")]
    assert len(messages) == 1
    assert not [line for line in lines if "Traceback" in line]
    return messages[0]


def test_help_is_quick_and_loads_nothing() -> None:
    program = (
        "import sys; from prodial_kernels.cli.commands import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code\n"
        "loaded = {'torch', 'transformers', 'triton', 'numpy', 'tqdm'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    for arguments in (["--help"], ["finetune", "--help"], ["evaluate", "-h"], ["--version"]):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
        )
        assert time.perf_counter() - started < 1.5
        assert "prodial" in done.stdout


def test_help_shows_the_commands_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for piece in ("finetune", "evaluate", "merge", "inspect", "examples:"):
        assert piece in text


def test_every_public_name_can_be_imported() -> None:
    for name in prodial_kernels.__all__:
        assert getattr(prodial_kernels, name) is not None
    assert set(prodial_kernels.__all__) == {"__version__", *prodial_kernels._HOMES}
    assert set(prodial_kernels.__all__) <= set(dir(prodial_kernels))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = prodial_kernels.nothing


def _parsed(*arguments: str) -> dict[str, Any]:
    import argparse

    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    add_finetune_options(parser)
    return config_values(parser.parse_args(arguments))


def test_flags_that_are_not_given_leave_no_trace() -> None:
    assert _parsed() == {}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--n-blocks", "8"], {"n_blocks": 8}),
        (["--n-blocks", "in_proj=8", "out_proj=4"], {"n_blocks": {"in_proj": 8, "out_proj": 4}}),
        (["--block-size", "2"], {"block_size": 2}),
        (["--target-modules", "in_proj"], {"target_modules": ["in_proj"]}),
        (["--target-modules", r".*\.in_proj"], {"target_modules": r".*\.in_proj"}),
        (["--no-scale", "--no-diagonal"], {"train_scale": False, "train_diagonal": False}),
        (["--max-bytes", "2M"], {"max_bytes": 2_000_000}),
        (["--eval-tokens", "64k"], {"eval_tokens": 64_000}),
        (["--gradient-checkpointing"], {"gradient_checkpointing": True}),
    ],
)  # fmt: skip
def test_flags_become_options(arguments: list[str], expected: dict[str, Any]) -> None:
    assert _parsed(*arguments) == expected
    FinetuneConfig.from_dict(expected)


def test_finetune_prints_the_table(
    place: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["finetune", "--resume", "--output", str(run_folder)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "held-out bits per byte" in printed.out
    assert "is finished: there is nothing to do" in printed.err


def test_flags_win_over_the_config_file(place: Path, tmp_path: Path) -> None:
    options = {
        "model": str(place / "model"), "data": str(place / "text.txt"), "steps": 2, "r": 3,
        "seq_len": 32, "batch_size": 2, "lora_dropout": 0.1,
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(options))
    arguments = ["--config", str(tmp_path / "run.json"), "--r", "5"]
    assert main(["finetune", *arguments, "--output", str(tmp_path / "run")]) == 0
    saved = json.loads((tmp_path / "run/run.json").read_text())["config"]
    assert (saved["r"], saved["lora_dropout"], saved["steps"]) == (5, 0.1, 2)


def test_evaluate_base_adapter_and_merged_agree_with_the_run(
    place: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.loads((run_folder / "results.json").read_text())
    data = ["--data", str(place / "text.txt"), "--split", "held-out", "--seq-len", "32", "--json"]
    for model, expected in (
        (["--model", str(place / "model")], results["before"]),
        (["--adapter", str(run_folder / "adapter")], results["after"]),
        (["--model", str(run_folder / "merged")], results["after"]),
    ):
        capsys.readouterr()
        assert main(["evaluate", *model, *data]) == 0
        metrics = json.loads(capsys.readouterr().out)["metrics"]
        assert metrics["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-5)


def test_a_run_or_a_file_of_an_adapter_stands_for_it(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = set()
    for path in (run_folder, run_folder / "adapter", run_folder / "adapter/adapter_config.json"):
        capsys.readouterr()
        assert main(["inspect", str(path)]) == 0
        printed.add(capsys.readouterr().out)
        assert adapter_directory(str(path)) == str(run_folder / "adapter")
    assert len(printed) == 1


def test_a_run_without_an_adapter_says_how_to_get_one(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(PathError, match=r"no adapter yet.*prodial finetune --resume --output"):
        adapter_directory(str(tmp_path))


def test_a_run_of_full_fine_tuning_names_its_model(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"config": {"method": "full"}}')
    with pytest.raises(PathError, match=r"trained every weight.*/model; give that with --model"):
        adapter_directory(str(tmp_path))


def test_evaluate_takes_the_number_of_examples_that_is_asked_for(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(place / "text.txt"), "--seq-len", "32", "--json"]
    for limit, n in (("7", 7), ("0.5", 30), ("1000", 60)):
        capsys.readouterr()
        assert main(["evaluate", "--model", str(place / "model"), *data, "--limit", limit]) == 0
        printed = capsys.readouterr()
        found = json.loads(printed.out)
        assert found["metrics"]["n_documents"] == n
        assert found["notes"] == ["text.txt: divided at blank lines into 60 texts"]
        assert f"on {n} text examples" in printed.err
        assert "text.txt: divided at blank lines into 60 texts" in printed.err


def test_inspection_escapes_control_characters(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from prodial_kernels.training import inspecting

    read = inspecting.read_adapter

    def hostile(path: Path) -> Any:
        saved = read(path)
        for tensor in saved.tensors.values():
            tensor.fill_(math.nan)
        return dataclasses.replace(saved, base_model="\x1b[2Jowned\n")

    monkeypatch.setattr(inspecting, "read_adapter", hostile)
    assert main(["inspect", str(run_folder)]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\\x1b[2Jowned\\n" in printed
    assert main(["inspect", str(run_folder), "--json"]) == 0

    def refuse(name: str) -> None:
        raise AssertionError(name)

    shown = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert shown["layers"][0]["lora_norm"] is None


def test_errors_escape_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.toml"
    config.write_text('"a\\u001b[2J\\u202eb" = 1\n', encoding="utf-8")
    assert main(["finetune", "--config", str(config), "--output", str(tmp_path / "run")]) == 1
    told = capsys.readouterr().err
    assert "\x1b" not in told
    assert "\u202e" not in told
    assert "a\\x1b[2J\\u202eb" in told


def test_messages_for_python_are_put_into_flags() -> None:
    assert in_flags("set allow_partial=True, or r=8") == "set --allow-partial, or r=8"
    assert in_flags("resume=True, or output=...") == "--resume, or --output"
    assert in_flags("exists (replace=True replaces it)") == "exists (--force replaces it)"
    assert in_flags("n_blocks=7 must divide in_features=192") == (
        "--n-blocks 7 must divide in_features=192"
    )
    assert in_flags("target_modules='(a+)+b' may take") == "--target-modules '(a+)+b' may take"
    assert in_flags("of target_modules=('a',)") == "of --target-modules ('a',)"
    assert in_flags("r must be >= 0") == "--r must be >= 0"
    assert in_flags("or set seq_len to at most 4.") == "or set --seq-len to at most 4."
    for kept in (
        "/tmp/seq_len/a.txt: empty", "the model must be", "'batch_size'", "my_seq_len",
        "call f(target_modules=['a'])",
    ):  # fmt: skip
        assert in_flags(kept) == kept


def test_evaluate_multiple_choice(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "questions.jsonl"
    rows = [{"context": "1+1", "choices": ["=2", "=3"], "label": 0}] * 3
    data.write_text("\n".join(map(json.dumps, rows)))
    capsys.readouterr()
    assert main(["evaluate", "--model", str(place / "model"), "--data", str(data)]) == 0
    printed = capsys.readouterr().out
    assert "accuracy, length-normalised" in printed
    assert "examples" in printed


def test_evaluate_hands_the_merged_model_to_the_harness(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prodial_kernels.training import evaluating
    from prodial_kernels.training.scoring import lm_eval as lm_eval_harness

    monkeypatch.setattr(lm_eval_harness, "check_tasks", lambda tasks, folder: None)
    seen: dict[str, Any] = {}

    def harness(path: Path, tasks: list[str], **options: Any) -> dict[str, dict[str, float]]:
        from safetensors import safe_open

        with safe_open(path / "model.safetensors", framework="pt") as file:
            assert not [name for name in file.keys() if "prodial" in name]  # noqa: SIM118
        seen.update(options, tasks=tasks, config=json.loads((path / "config.json").read_text()))
        return {"arc_easy": {"acc": 0.25}}

    monkeypatch.setattr(evaluating, "run_lm_eval", harness)
    arguments = ["--adapter", str(run_folder / "adapter"), "--lm-eval", "arc_easy", "--limit", "7"]
    assert main(["evaluate", *arguments]) == 0
    assert "arc_easy" in capsys.readouterr().out
    assert (seen["tasks"], seen["limit"], seen["config"]["model_type"]) == (
        ["arc_easy"],
        7,
        "mamba2",
    )


def test_merge_writes_a_model_once(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "merged"
    arguments = ["merge", "--adapter", str(run_folder / "adapter"), "--output", str(output)]
    assert main(arguments) == 0
    assert "logits differ by at most" in capsys.readouterr().out
    from safetensors.torch import load_file

    ours, runs = (load_file(p / "model.safetensors") for p in (output, run_folder / "merged"))
    assert ours.keys() == runs.keys()
    assert all(bool((ours[name] == runs[name]).all()) for name in ours)
    assert "already exists (--force replaces it)" in _error(capsys, arguments)
    assert main([*arguments, "--force"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]


def test_inspect_an_adapter_and_a_model(
    place: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(run_folder / "adapter")]) == 0
    printed = capsys.readouterr().out
    for piece in ("|D_b-I|", "|s-1|", "lora_alpha=16", "backbone.layers.1.mixer.out_proj"):
        assert piece in printed
    assert main(["inspect", str(place / "model"), "--r", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    # Twice: 32·152 and 64·32 with s, a 1×1 diagonal and rank 2.
    assert plan["report"]["trainable"] == 2 * (152 + 32 + 2 * 184 + 32 + 64 + 2 * 96)
    assert main(["inspect", str(place / "model"), "--method", "partial-tuning", "parts=D"]) == 0
    printed = capsys.readouterr().out
    # A D for each of 8 heads.
    assert "backbone.layers.*.mixer ×2" in printed
    assert " 16 " in printed
    assert "none of the 2 mixers" not in printed
    assert "train_scale" not in printed


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "required: COMMAND"),
        (["finetun"], 2, "invalid choice: 'finetun'"),
        (["finetun"], 2, "did you mean 'finetune'?"),
        (["finetune", "--rannk=8"], 2, "unknown option --rannk; did you mean --rank?"),
        (["finetune", "-r", "8"], 2, "unknown option -r; did you mean --r?"),
        (["finetune", "--max_steps", "8"], 2, "unknown option --max_steps; did you mean --steps?"),
        (["finetune", "--model-name", "x"], 2, "did you mean --model? (see 'prodial finetune"),
        (["finetune", "--adapter", "x"], 2, "has none of that name, 'prodial evaluate' and"),
        (["merge", "--adaptr", "x", "--output", "y"], 2, "--adaptr; did you mean --adapter?"),
        (["finetune", "TEXT"], 2, "did you mean --data "),
        (["finetune", "MODEL"], 2, "did you mean --model "),
        (["evaluate", "ADAPTER"], 2, "did you mean --adapter "),
        (["finetune", "9" * 5000], 2, "everything is given by name"),
        (["evaluate", "--adapter", "9" * 5000], 1, "File name too long"),
        (["finetune", "none.txt"], 2, "unexpected 'none.txt': everything is given by name"),
        (["finetune", "--memory-budget", "8", "GB"], 2, "takes one word: write 8GB, or '8 GB'"),
        (["finetune", "--memory-budget", "-8GB"], 1, "--memory-budget: expected a size such as"),
        (["finetune", "--memory-budget", "8"], 1, "is 8 bytes, too few .*; did you mean '8GB'?"),
        (["finetune", "--steps", "-1"], 1, "--steps must be at least 1, got -1"),
        (["finetune", "--lr", "-1e-3"], 1, "--lr must be positive, got -0.001"),
        (["finetune", "--lr", "abc"], 2, "--lr/--learning-rate: expected a number such as 0.001"),
        (["finetune", "--batch-size", "two"], 2, "expected a whole number such as 8, got 'two'"),
        (["finetune", "--lr", "1e308"], 1, "--lr must be at most 100, got 1e+308"),
        (["finetune", "--lr", "1e9"], 1, "--lr must be at most 100, got 1000000000.0"),
        (["finetune", "--seed", "18446744073709551616"], 1, "--seed must be at most"),
        (["finetune", "--lora-alpha", "1e308"], 1, "--lora-alpha must be at most 1000000.0"),
        (["finetune", "--r", "1000000000"], 1, "--r must be at most 65536, got 1000000000"),
        (["finetune", "--batch-size", "9000000"], 1, "tokens in a step; it must be at most"),
        (["finetune", "--batch-size", "9" * 99], 1, "got a number of about"),
        (["finetune", "--lora-dropout", "1.5"], 1, "--lora-dropout must be at least 0 and less"),
        (["finetune", "--r", "0", "--no-scale", "--no-diagonal"], 1, "--r is 0, and there is nei"),
        (["finetune", "--steps", "5", "--epochs", "1"], 1, "give --steps or --epochs, not both"),
        (["finetune", "--method", "full", "--no-scale"], 1, "leave out --no-scale, or take"),
        (["finetune", "--data", ""], 1, "--data must not be empty"),
        (["evaluate", "--model", "MODEL", "--num-fewshot", "2"], 1, "--num-fewshot would have no"),
        (["evaluate", "--lm-eval", "x", "--max-tokens", "2"], 1, "--max-tokens would have no ef"),
        (["evaluate", "--limit", "0"], 2, "expected a whole number from 1 on, or a share"),
        (["evaluate", "--seq-len", "0"], 2, "must be at least 1, got 0"),
        (["finetune", "--stepz", "3"], 2, "unknown option --stepz; did you mean --steps? (see"),
        (["finetune", "--data", "a", "--data=b"], 2, "--data is given 2 times, and takes one"),
        (["finetune", "--n-blocks", "in_proj=4", "--n-blocks", "out_proj=8"], 2, "after one --n-"),
        (["finetune", "--steps", "5", "--steps", "3", "--data", ""], 1, "--data must not be empty"),
        (["finetune", "--device", "gpu"], 2, "did you mean 'cuda'?"),
        (["finetune", "--steps", "many"], 2, "expected a number such as 500"),
        (["finetune", "--n-blocks", "4", "5"], 1, "give one number, or a NAME=NUMBER"),
        (["finetune", "--preset", "arc-hard"], 1, "preset must be one of 'arc-easy'"),
        (["finetune", "--config", "none.toml"], 1, "none.toml: no such file"),
        (["finetune", "--resume"], 1, "no run to resume in prodial-output"),
        (["finetune", "--model", "./none", "--data", "TEXT"], 1, "./none: no such directory"),
        (["finetune", "--model", "MODEL", "--data", "./none"], 1, "./none: no such file or dir"),
        (["finetune", "--model", "MODEL", "--data", "EMPTY"], 1, "empty"),
        (["finetune", "--model", "MODEL", "--data", "BINARY"], 1, "not UTF-8"),
        ([*_ON_TEXT, "--n-blocks", "7"], 1, "--n-blocks 7 must divide"),
        ([*_ON_TEXT, "--r", "1000"], 1, "--r must be at most 32, the smaller side of .*, got 1000"),
        (["inspect", "MODEL", "--rank", "65"], 1, "--r must be at most 32.*got 65"),
        ([*_ON_TEXT, "--n-blocks", "in_porj=4"], 1, "--n-blocks given per target must use names"),
        ([*_ON_TEXT, "--target-modules", "q"], 1, "matches nothing"),
        ([*_ON_TEXT, "--target-modules", "q,p"], 1, "--target-modules holds.*by itself: 'q' 'p'"),
        (["evaluate", "--adapter", "./none"], 1, "none: no such directory"),
        (["evaluate", "--adapter", "EMPTY"], 1, "it is a file, and no adapter lies beside it"),
        (["evaluate", "--adapter", "MODEL"], 1, "it holds a model, not an adapter"),
        (["evaluate", "--adapter", "FOLDER"], 1, "it holds no adapter (no adapter_config.json"),
        (["merge", "--adapter", "./folde", "--output", "x"], 1, "did you mean 'folder'?"),
        (["evaluate", "--model", "ADAPTER"], 1, "holds an adapter, not a model"),
        (["evaluate", "--model", "EMPTY"], 1, "is a file; give the directory"),
        (["merge", "--adapter", "ADAPTER"], 2, "required: --output"),
        (["convert", "none", "--to", "peft", "--output", "x"], 1, "none: no such directory"),
        (["convert", "ADAPTER", "--to", "dora", "--output", "x"], 2, "invalid choice: 'dora'"),
        (["convert", "ADAPTER", "--to", "lora", "--output", "x"], 1, "has s or D_b.*--to peft"),
        (["convert", "EMPTY", "--to", "peft", "--output", "x"], 1, "error: /.*it is a file"),
        (["inspect", "FOLDER"], 1, "no config.json in it"),
        (["inspect", "folder/adapter"], 1, "folder/adapter: no such directory"),
        (["inspect", "my-run/adapter"], 1, "there is no directory 'my-run' either"),
    ],
)  # fmt: skip
def test_errors_are_one_clear_line(
    place: Path,
    run_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (("empty.txt", b""), ("binary.txt", b"\xff\xfe\x00\x01")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    stands_for = {
        "MODEL": str(place / "model"),
        "TEXT": str(place / "text.txt"),
        "ADAPTER": str(run_folder / "adapter"),
        "EMPTY": str(tmp_path / "empty.txt"),
        "BINARY": str(tmp_path / "binary.txt"),
        "FOLDER": str(tmp_path / "folder"),
    }
    found = _error(capsys, [stands_for.get(a, a) for a in arguments], code)
    assert all(part in found for part in message.split(".*"))
    assert not (tmp_path / "prodial-output").exists()


def test_without_cuda_it_says_so(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ["evaluate", "--model", str(place / "model"), "--device", "cuda"]
    assert "finds no CUDA device; use 'cpu'" in _error(capsys, arguments)


def test_an_unknown_hub_model_offline_is_clear(capsys: pytest.CaptureFixture[str]) -> None:
    message = _error(capsys, ["evaluate", "--model", "nobody/no-such-model"])
    assert "the hub did not give it" in message
    assert "'embedded' always works offline" in message


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    from prodial_kernels.training.run.directory import RunError

    with pytest.raises(RunError):
        main(["finetune", "--resume", "--debug"])


def test_errors_of_others_are_named_by_class(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prodial_kernels.training import adapted

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("thing")

    monkeypatch.setattr(adapted, "load_model", broken)
    message = _error(capsys, ["evaluate", "--model", "x"])
    assert "KeyError: 'thing' ('--debug' shows where)" in message


def test_convert_there_and_back(
    place: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file

    there, back = str(tmp_path / "peft"), str(tmp_path / "back")
    assert main(["convert", str(run_folder), "--to", "peft", "--output", there]) == 0
    assert f"wrote {there}" in capsys.readouterr().out
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["peft_type"] == "PRODIAL"
    assert main(["convert", there, "--to", "prodial", "--output", back]) == 0
    first, second = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (run_folder / "adapter", tmp_path / "back")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "is not an empty directory" in _error(
        capsys, ["convert", there, "--to", "prodial", "--output", back]
    )
