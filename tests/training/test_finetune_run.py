"""Whole runs on a tiny model: every method, what they leave behind, and what they refuse."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prodial_kernels import ProdialLinear, apply_prodial, load_adapter
from prodial_kernels.training import FinetuneConfig, FinetuneResult, finetune, finetuning
from prodial_kernels.training.inspection import inspect_adapter
from prodial_kernels.training.interrupt import Interrupted
from prodial_kernels.training.loop import NonFiniteLossError
from prodial_kernels.training.merging import MergeError
from prodial_kernels.training.method import matched_lora_rank
from prodial_kernels.training.metrics import read_metrics
from prodial_kernels.training.model import load_model
from prodial_kernels.training.run import RunError


def _config(place: Path, output: Path, **options: Any) -> FinetuneConfig:
    defaults = {
        "model": str(place / "model"),
        "data": str(place / "text.txt"),
        "steps": 12,
        "batch_size": 4,
        "seq_len": 32,
        "eval_every": 5,
        "save_every": 4,
        "warmup": 2,
        "lr": 0.01,
        "device": "cpu",
    }
    return FinetuneConfig(output=str(output), **{**defaults, **options})


def _run(place: Path, output: Path, *, resume: bool = False, **options: Any) -> FinetuneResult:
    return finetune(_config(place, output, **options), resume=resume, progress=False)


@pytest.fixture(scope="module")
def prodial_run(place: Path) -> FinetuneResult:
    return _run(place, place / "prodial", lora_dropout=0.1)


def _load(path: Path) -> Any:
    return load_model(str(path), device=torch.device("cpu"), dtype=torch.float32).model


def test_learns_and_reports(prodial_run: FinetuneResult) -> None:
    assert prodial_run.after["bits_per_byte"] < 0.95 * prodial_run.before["bits_per_byte"]
    assert prodial_run.agreement.relative < 1e-5
    assert 0 < prodial_run.trainable < prodial_run.total
    assert prodial_run.peak_bytes > 2**20
    table = str(prodial_run)
    for piece in ("held-out bits per byte", "trainable parameters", "peak memory", "time", "%)"):
        assert piece in table


def test_leaves_everything_behind(prodial_run: FinetuneResult) -> None:
    folder = prodial_run.output
    names = {"adapter", "loss.png", "merged", "metrics.jsonl", "results.json", "run.json", "state"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    records = read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 13))
    assert [r["step"] for r in records if r["kind"] == "evaluation"] == [0, 5, 10, 12]
    assert json.loads((folder / "results.json").read_text())["steps"] == 12
    assert sorted(p.name for p in (folder / "state").iterdir()) == ["step-000008", "step-000012"]


def test_adapter_and_merged_model_are_the_trained_model(
    place: Path, prodial_run: FinetuneResult
) -> None:
    adapted = _load(place / "model")
    load_adapter(adapted, prodial_run.output / "adapter")
    merged = _load(prodial_run.model_dir)
    assert not [m for m in merged.modules() if isinstance(m, ProdialLinear)]
    tokens = torch.randint(0, 257, (2, 40))
    with torch.inference_mode():
        base = _load(place / "model")(tokens).logits
        torch.testing.assert_close(merged(tokens).logits, adapted(tokens).logits)
        assert not torch.allclose(merged(tokens).logits, base, atol=1e-2)


def test_loaded_weights_are_not_rescaled(place: Path, tmp_path: Path) -> None:
    """transformers divides out_proj by sqrt(layers) at every load if the configuration says so."""
    model = _load(place / "model")
    model.config.rescale_prenorm_residual = True
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((place / "model/tokenizer.json").read_bytes())
    again = _load(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    assert not again.config.rescale_prenorm_residual


def test_inspection_sees_the_training(prodial_run: FinetuneResult) -> None:
    inspection = inspect_adapter(prodial_run.output / "adapter")
    assert inspection.trainable == prodial_run.trainable
    assert [layer.module for layer in inspection.layers] == [
        f"backbone.layers.{i}.mixer.{name}" for i in (0, 1) for name in ("in_proj", "out_proj")
    ]
    for layer in inspection.layers:
        assert layer.diagonal_max is not None
        assert layer.diagonal_max > 0
        assert layer.scale_max is not None
        assert layer.scale_max > 0
        assert layer.lora_norm is not None
        assert layer.lora_norm > 0
    assert "backbone.layers.0.mixer.in_proj" in str(inspection)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["prodial", "full"])
def test_on_cuda_in_bfloat16_with_a_resume(
    place: Path, tmp_path: Path, method: str, stop_after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"device": "cuda", "method": method, "lr": 0.005}
    whole = _run(place, tmp_path / "whole", **options)
    assert whole.after["bits_per_byte"] < 0.95 * whole.before["bits_per_byte"]
    assert (whole.device, whole.peak_bytes > 0) == ("cuda", True)
    stop_after(6)
    with pytest.raises(_Stop):
        _run(place, tmp_path / "run", **options)
    monkeypatch.undo()
    _run(place, tmp_path / "run", resume=True, **options)
    losses = [
        [r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl") if r["kind"] == "train"]
        for name in ("whole", "run")
    ]
    # Sums on the GPU are not in a fixed order.
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_lora_of_the_same_size(place: Path, tmp_path: Path, prodial_run: FinetuneResult) -> None:
    result = _run(place, tmp_path / "lora", method="lora")
    assert result.after["bits_per_byte"] < result.before["bits_per_byte"]
    layers = inspect_adapter(tmp_path / "lora" / "adapter").layers
    assert {layer.r for layer in layers} == {result.rank}
    assert all(layer.scale_mean is None and layer.diagonal_mean is None for layer in layers)
    per_rank = result.trainable // (result.rank or 1)
    assert abs(result.trainable - prodial_run.trainable) <= per_rank / 2
    assert result.before == prodial_run.before


@pytest.mark.parametrize(
    ("options", "target"),
    [({"r": 2}, 0), ({"r": 4, "block_size": 8}, 0), ({"r": 1, "train_scale": False}, 0)],
)
def test_matched_rank_is_the_closest(options: dict[str, Any], target: int) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj, self.out_proj = nn.Linear(16, 56), nn.Linear(32, 16)

    def size(config: Any) -> int:
        return apply_prodial(nn.Sequential(Block(), Block()), config).trainable

    reference = FinetuneConfig(**options).adapter()
    rank = matched_lora_rank(nn.Sequential(Block(), Block()), reference)
    goal = size(reference)
    distances = {
        r: abs(size(FinetuneConfig(method="lora", r=r).adapter()) - goal)
        for r in range(1, 2 * rank + 8)
    }
    assert distances[rank] == min(distances.values())


def test_full_fine_tuning_writes_a_model(place: Path, tmp_path: Path) -> None:
    result = _run(place, tmp_path / "full", method="full", lr=0.003)
    assert result.trainable == result.total
    assert result.after["bits_per_byte"] < result.before["bits_per_byte"]
    assert result.adapter_dir is None
    assert not (tmp_path / "full" / "adapter").exists()
    trained, base = _load(result.model_dir), _load(place / "model")
    frozen = [n for n, p in trained.named_parameters() if torch.equal(p, base.get_parameter(n))]
    assert not frozen


def test_gradient_checkpointing_changes_nothing_but_memory(place: Path, tmp_path: Path) -> None:
    losses = []
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        _run(
            place, tmp_path / name, steps=3, lora_dropout=0.2,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        losses.append([r["loss"] for r in records if r["kind"] == "train"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_multiple_choice_is_evaluated_by_accuracy(place: Path, tmp_path: Path) -> None:
    rows = [
        {"context": f"Number {i} is", "choices": ["even", "odd"], "label": i % 2} for i in range(40)
    ]
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    result = _run(place, tmp_path / "choice", data=str(data), steps=3)
    assert 0 <= result.after["acc"] <= 1
    assert "held-out accuracy" in str(result)
    assert (tmp_path / "choice" / "loss.png").exists()


def test_epochs_count_the_data(place: Path, tmp_path: Path) -> None:
    one = _run(place, tmp_path / "one", steps=None, epochs=0.25, grad_accumulation=2)
    n_windows = math.ceil((2995 + 53) / 32)
    assert one.steps == math.ceil(math.ceil(0.25 * math.ceil(n_windows / 4)) / 2)


class _Stop(Exception):
    pass


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a run fail without warning when a step has been logged."""

    def arrange(step: int, error: BaseException | None = None) -> None:
        logged = finetuning._Events.logged

        def stopping(self: Any, record: Any) -> None:
            logged(self, record)
            if record.position.step == step:
                raise error or _Stop

        monkeypatch.setattr(finetuning._Events, "logged", stopping)

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
    prodial_run: FinetuneResult,
    monkeypatch: pytest.MonkeyPatch,
    stop_after: Any,
    stop: int,
    first: int,
) -> None:
    stop_after(stop)
    with pytest.raises(_Stop):
        _run(place, tmp_path / "run", lora_dropout=0.1)
    monkeypatch.undo()
    states = sorted(p.name for p in (tmp_path / "run").glob("state/step-*"))
    assert (states[-1:] or ["step-000000"]) == [f"step-{first:06d}"]
    torch.manual_seed(stop)
    result = _run(place, tmp_path / "run", resume=True, lora_dropout=0.1)
    assert _lines(tmp_path / "run") == _lines(prodial_run.output)
    assert result.after == prodial_run.after
    assert result.before == prodial_run.before
    left = (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    assert left == (prodial_run.output / "adapter/adapter_model.safetensors").read_bytes()


def test_a_damaged_state_is_skipped(
    place: Path, tmp_path: Path, prodial_run: FinetuneResult, stop_after: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stop_after(10)
    with pytest.raises(_Stop):
        _run(place, tmp_path / "run", lora_dropout=0.1)
    monkeypatch.undo()
    (tmp_path / "run/state/step-000008/tensors.safetensors").write_bytes(b"half")
    _run(place, tmp_path / "run", resume=True, lora_dropout=0.1)
    assert _lines(tmp_path / "run") == _lines(prodial_run.output)


def test_resuming_a_finished_run_only_finishes_again(place: Path, tmp_path: Path) -> None:
    first = _run(place, tmp_path / "run", steps=4)
    again = _run(place, tmp_path / "run", steps=4, resume=True)
    assert again.after == first.after
    assert [r["step"] for r in _lines(tmp_path / "run") if r["kind"] == "train"] == [1, 2, 3, 4]


def test_refuses_to_start_over_a_run_or_in_a_full_directory(
    place: Path, prodial_run: FinetuneResult, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=r"already holds a run.*--resume.*--output"):
        _run(place, prodial_run.output)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match="not an empty directory"):
        _run(place, tmp_path)


def test_two_processes_do_not_run_in_one_directory(
    place: Path, prodial_run: FinetuneResult
) -> None:
    from prodial_kernels.training.run import RunDirectory

    before = (prodial_run.output / "metrics.jsonl").read_bytes()
    with (
        RunDirectory(prodial_run.output).only_one_process(),
        pytest.raises(RunError, match="another process is running"),
    ):
        _run(place, prodial_run.output, resume=True, lora_dropout=0.1)
    assert (prodial_run.output / "metrics.jsonl").read_bytes() == before


def test_refuses_to_resume_nothing(place: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run to resume"):
        _run(place, tmp_path / "none", resume=True)


def test_refuses_to_resume_another_run(
    place: Path, tmp_path: Path, prodial_run: FinetuneResult
) -> None:
    with pytest.raises(RunError, match=r"differ: lr \(run: 0\.01, now: 0\.02\), r \(run: 16, now"):
        _run(place, prodial_run.output, resume=True, lora_dropout=0.1, lr=0.02, r=3)
    text = place / "text.txt"
    content = text.read_text()
    try:
        text.write_text(content.replace("red", "RED"))
        with pytest.raises(RunError, match=r"differ: data \(its contents have changed\)"):
            _run(place, prodial_run.output, resume=True, lora_dropout=0.1)
    finally:
        text.write_text(content)
    weights = place / "model" / "model.safetensors"
    original = weights.read_bytes()
    try:
        model = _load(place / "model")
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(1.0)
        model.save_pretrained(place / "model")
        with pytest.raises(RunError, match=r"differ: model \(its contents have changed\)"):
            _run(place, prodial_run.output, resume=True, lora_dropout=0.1)
    finally:
        weights.write_bytes(original)


def test_a_run_may_be_moved_and_saved_more_often(
    place: Path, tmp_path: Path, stop_after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(5)
    with pytest.raises(_Stop):
        _run(place, tmp_path / "here")
    monkeypatch.undo()
    (tmp_path / "here").rename(tmp_path / "there")
    assert _run(place, tmp_path / "there", resume=True, save_every=1).steps == 12


def test_divergence_stops_and_keeps_the_last_good_state(place: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"at step \d+ .*lower.*learning rate") as caught:
        _run(place, tmp_path / "run", lr=1e30, clip=0.0, save_every=1, eval_every=0)
    states = sorted(p.name for p in (tmp_path / "run/state").iterdir())
    assert states
    assert states[-1] in str(caught.value)


def test_a_full_disk_keeps_the_last_state(
    place: Path, tmp_path: Path, prodial_run: FinetuneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prodial_kernels.training import state

    write = state.write_safetensors
    calls: list[Path] = []

    def full(path: Path, tensors: Any) -> None:
        calls.append(path)
        write(path, tensors)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(state, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        _run(place, tmp_path / "run", lora_dropout=0.1)
    assert [p.name for p in (tmp_path / "run/state").iterdir()] == ["step-000004"]
    monkeypatch.undo()
    _run(place, tmp_path / "run", lora_dropout=0.1, resume=True)
    assert _lines(tmp_path / "run") == _lines(prodial_run.output)


def test_a_wrong_merge_is_found(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: nn.Module) -> nn.Module:
        from prodial_kernels import remove_prodial

        return remove_prodial(model)

    monkeypatch.setattr(finetuning, "merge_prodial", wrong)
    with pytest.raises(MergeError, match="does not compute what was trained"):
        _run(place, tmp_path / "run", steps=5)
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()


def test_ctrl_c_saves_the_step(
    place: Path, tmp_path: Path, prodial_run: FinetuneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    logged = finetuning._Events.logged

    def interrupting(self: Any, record: Any) -> None:
        logged(self, record)
        if record.position.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(finetuning._Events, "logged", interrupting)
    with pytest.raises(Interrupted):
        _run(place, tmp_path / "run", lora_dropout=0.1)
    monkeypatch.undo()
    states = sorted(p.name for p in (tmp_path / "run/state").iterdir())
    assert states[-1] == "step-000007"
    _run(place, tmp_path / "run", lora_dropout=0.1, resume=True)
    assert _lines(tmp_path / "run") == _lines(prodial_run.output)
