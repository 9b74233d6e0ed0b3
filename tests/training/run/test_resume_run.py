"""Runs that stop and are resumed: they end as if they had not stopped, or are refused, and why."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prodial_kernels.training import FinetuneResult, finetuning
from prodial_kernels.training.config import OPTIONS
from prodial_kernels.training.run.directory import RunError
from prodial_kernels.training.run.loop import NonFiniteLossError
from prodial_kernels.training.run.metrics import read_metrics
from prodial_kernels.training.run.signals import Interrupted
from support.tiny_run import load, run


@pytest.fixture(scope="module")
def whole_run(place: Path) -> FinetuneResult:
    """One that nothing interrupts."""
    return run(place, place / "whole", lora_dropout=0.1)


class _Stop(Exception):
    pass


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a run fail without warning when a step has been logged."""

    def arrange(step: int) -> None:
        logged = finetuning.RunEvents.logged

        def stopping(self: Any, record: Any) -> None:
            logged(self, record)
            if record.position.step == step:
                raise _Stop

        monkeypatch.setattr(finetuning.RunEvents, "logged", stopping)

    return arrange


def _lines(output: Path) -> list[dict[str, Any]]:
    """The metrics, without the times."""
    timed = ("seconds", "tokens_per_second")
    return [
        {k: v for k, v in record.items() if k not in timed}
        for record in read_metrics(output / "metrics.jsonl")
    ]


@pytest.mark.parametrize(("stop", "first"), [(6, 4), (2, 0), (12, 8)])
def test_resuming_gives_the_same_losses(
    place: Path,
    tmp_path: Path,
    whole_run: FinetuneResult,
    monkeypatch: pytest.MonkeyPatch,
    stop_after: Any,
    stop: int,
    first: int,
) -> None:
    stop_after(stop)
    with pytest.raises(_Stop):
        run(place, tmp_path / "run", lora_dropout=0.1)
    monkeypatch.undo()
    states = sorted(p.name for p in (tmp_path / "run").glob("state/step-*"))
    assert (states[-1:] or ["step-000000"]) == [f"step-{first:06d}"]
    torch.manual_seed(stop)
    result = run(place, tmp_path / "run", resume=True, lora_dropout=0.1)
    assert _lines(tmp_path / "run") == _lines(whole_run.output)
    assert result.after == whole_run.after
    assert result.before == whole_run.before
    left = (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    assert left == (whole_run.output / "adapter/adapter_model.safetensors").read_bytes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["prodial", "full"])
def test_on_cuda_in_bfloat16_with_a_resume(
    place: Path, tmp_path: Path, method: str, stop_after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"device": "cuda", "method": method, "lr": 0.005}
    whole = run(place, tmp_path / "whole", **options)
    assert whole.after["bits_per_byte"] < 0.95 * whole.before["bits_per_byte"]
    assert (whole.device, whole.peak_bytes > 0) == ("cuda", True)
    stop_after(6)
    with pytest.raises(_Stop):
        run(place, tmp_path / "run", **options)
    monkeypatch.undo()
    run(place, tmp_path / "run", resume=True, **options)
    losses = [
        [r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl") if r["kind"] == "train"]
        for name in ("whole", "run")
    ]
    # Sums on the GPU are not in a fixed order.
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_a_damaged_state_is_skipped(
    place: Path, tmp_path: Path, whole_run: FinetuneResult, stop_after: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stop_after(10)
    with pytest.raises(_Stop):
        run(place, tmp_path / "run", lora_dropout=0.1)
    monkeypatch.undo()
    (tmp_path / "run/state/step-000008/tensors.safetensors").write_bytes(b"half")
    run(place, tmp_path / "run", resume=True, lora_dropout=0.1)
    assert _lines(tmp_path / "run") == _lines(whole_run.output)


def test_resuming_a_finished_run_does_nothing_and_says_so(
    place: Path, whole_run: FinetuneResult, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _contents(whole_run.output)
    again = run(place, whole_run.output, resume=True, progress=True, lora_dropout=0.1)
    assert again == whole_run
    assert "is finished: there is nothing to do" in capsys.readouterr().err
    assert _contents(whole_run.output) == before


@pytest.mark.parametrize("gone", ["results.json", "merged", "adapter"])
def test_a_run_whose_end_was_cut_off_is_finished_again(
    place: Path, tmp_path: Path, whole_run: FinetuneResult, gone: str
) -> None:
    folder = shutil.copytree(whole_run.output, tmp_path / "run")
    if gone == "results.json":
        (folder / gone).write_text("[" * 100_000)
    else:
        shutil.rmtree(folder / gone)
    again = run(place, folder, resume=True, lora_dropout=0.1)
    assert again.after == whole_run.after
    assert _lines(folder) == _lines(whole_run.output)
    for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (folder / file).read_bytes() == (whole_run.output / file).read_bytes()


def _contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_refuses_to_start_over_a_run_or_in_a_full_directory(
    place: Path, whole_run: FinetuneResult, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=r"already holds a run.*resume=True.*output="):
        run(place, whole_run.output)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match="not an empty directory"):
        run(place, tmp_path)


def test_two_processes_do_not_run_in_one_directory(place: Path, whole_run: FinetuneResult) -> None:
    from prodial_kernels.training.run.directory import RunDirectory

    before = (whole_run.output / "metrics.jsonl").read_bytes()
    with (
        RunDirectory(whole_run.output).only_one_process(),
        pytest.raises(RunError, match="another process is running"),
    ):
        run(place, whole_run.output, resume=True, lora_dropout=0.1)
    assert (whole_run.output / "metrics.jsonl").read_bytes() == before


def test_refuses_to_resume_nothing(place: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run to resume"):
        run(place, tmp_path / "none", resume=True)


def test_refuses_to_resume_another_run(
    place: Path, tmp_path: Path, whole_run: FinetuneResult
) -> None:
    output = shutil.copytree(whole_run.output, tmp_path / "run")
    with pytest.raises(RunError, match=r"differ: lr \(run: 0\.01, now: 0\.02\), r \(run: 16, now"):
        run(place, output, resume=True, lora_dropout=0.1, lr=0.02, r=3)
    (output / "results.json").unlink()
    text = place / "text.txt"
    content = text.read_text()
    try:
        text.write_text(content.replace("red", "RED"))
        with pytest.raises(RunError, match=r"differ: data \(its contents have changed\)"):
            run(place, output, resume=True, lora_dropout=0.1)
    finally:
        text.write_text(content)
    weights = place / "model" / "model.safetensors"
    original = weights.read_bytes()
    try:
        model = load(place / "model")
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(1.0)
        model.save_pretrained(place / "model")
        with pytest.raises(RunError, match=r"differ: model \(its contents have changed\)"):
            run(place, output, resume=True, lora_dropout=0.1)
    finally:
        weights.write_bytes(original)


def test_a_run_may_be_moved_and_saved_more_often(
    place: Path, tmp_path: Path, stop_after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(5)
    with pytest.raises(_Stop):
        run(place, tmp_path / "here")
    monkeypatch.undo()
    (tmp_path / "here").rename(tmp_path / "there")
    assert run(place, tmp_path / "there", resume=True, save_every=1).steps == 12


def test_divergence_stops_and_keeps_the_last_good_state(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What overflows within a few steps is refused as a slip of the keyboard.
    monkeypatch.setitem(OPTIONS, "lr", replace(OPTIONS["lr"], range=(0, 1e40)))
    with pytest.raises(NonFiniteLossError, match=r"at step \d+ .*lower.*learning rate") as caught:
        run(place, tmp_path / "run", lr=1e30, clip=0.0, save_every=1, eval_every=0)
    states = sorted(p.name for p in (tmp_path / "run/state").iterdir())
    assert states
    assert states[-1] in str(caught.value)


def test_a_full_disk_keeps_the_last_state(
    place: Path, tmp_path: Path, whole_run: FinetuneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prodial_kernels.training.run import state

    write = state.write_safetensors
    calls: list[Path] = []

    def full(path: Path, tensors: Any) -> None:
        calls.append(path)
        write(path, tensors)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(state, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        run(place, tmp_path / "run", lora_dropout=0.1)
    assert [p.name for p in (tmp_path / "run/state").iterdir()] == ["step-000004"]
    monkeypatch.undo()
    run(place, tmp_path / "run", lora_dropout=0.1, resume=True)
    assert _lines(tmp_path / "run") == _lines(whole_run.output)


class _Gone:
    """A terminal that was closed."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    flush = fileno = isatty = lambda self: self.write("")


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_signal_saves_the_step(
    place: Path,
    tmp_path: Path,
    whole_run: FinetuneResult,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Also where the terminal has gone, to which the run would show its progress."""
    import signal

    logged = finetuning.RunEvents.logged

    def interrupting(self: Any, record: Any) -> None:
        if record.position.step == 7:
            if name == "SIGHUP":
                monkeypatch.setattr("sys.stderr", _Gone())
            os.kill(os.getpid(), getattr(signal, name))
        logged(self, record)

    monkeypatch.setattr(finetuning.RunEvents, "logged", interrupting)
    with pytest.raises(Interrupted, match=name):
        run(place, tmp_path / "run", progress=True, lora_dropout=0.1)
    monkeypatch.undo()
    states = sorted(p.name for p in (tmp_path / "run/state").iterdir())
    assert states[-1] == "step-000007"
    run(place, tmp_path / "run", lora_dropout=0.1, resume=True)
    assert _lines(tmp_path / "run") == _lines(whole_run.output)
