"""Running out of memory: what is saved, what is said, and that a resumed run loses nothing."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import ProdialLinear
from prodial_kernels.cli import commands
from prodial_kernels.training import FinetuneConfig
from prodial_kernels.training.config import ConfigError
from prodial_kernels.training.data.batches import Batch
from prodial_kernels.training.run.metrics import read_metrics
from prodial_kernels.training.step.eager import EagerStep, StepResult
from prodial_kernels.training.step.out_of_memory import GuardedStep, OutOfMemory, out_of_memory
from support import tiny_run
from support.models import build
from support.tiny_model import byte_tokenizer, write_text

SHORT: dict[str, Any] = {
    "steps": 4, "batch_size": 2, "eval_every": 0, "eval_tokens": 64, "save_every": 0,
}  # fmt: skip
run = partial(tiny_run.run, **SHORT)


def lines(output: Path) -> list[dict[str, Any]]:
    timed = ("seconds", "tokens_per_second")
    return [
        {k: v for k, v in record.items() if k not in timed}
        for record in read_metrics(output / "metrics.jsonl")
    ]


@contextlib.contextmanager
def exhausted(target: Any, name: str, *, call: int, before: bool = False) -> Iterator[list[int]]:
    """Let the function's call with this number (from 1) run out of memory when it is through."""
    original: Callable[..., Any] = getattr(target, name)
    calls = [0]

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if before and calls[0] == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        result = original(*args, **kwargs)
        if calls[0] == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, failing)
        yield calls


OPTIONS: dict[str, dict[str, Any]] = {
    "accumulation, dropout": {"grad_accumulation": 2, "lora_dropout": 0.1},
    "nf4, checkpoint": {"quantize": "nf4", "activations": "checkpoint", "lora_dropout": 0.2},
    "int8, blocks": {"quantize": "int8", "block_size": 2, "diagonal": "free", "clip": 0.0},
    "fp8, recompute": {"quantize": "fp8", "activations": "recompute"},
    "chunked, documents": {"loss": "chunked", "schedule": "cosine", "packing": "documents"},
    "full": {"method": "full", "lr": 1e-3},
    "lora": {"method": "lora", "loss": "full"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_state_is_saved_and_a_resumed_run_loses_nothing(
    name: str, place: Path, tmp_path: Path
) -> None:
    options = OPTIONS[name]
    whole = run(place, tmp_path / "whole", **options)
    # The third step has drawn its dropout and added its gradients when memory runs out.
    with (
        exhausted(EagerStep, "accumulate", call=3),
        pytest.raises(OutOfMemory, match="the state after step 2 is saved") as caught,
    ):
        run(place, tmp_path / "run", **options)
    assert caught.value.whole
    assert "Tried to allocate 2.00 GiB" in str(caught.value)
    assert "goes on with resume=True, also with another memory_budget" in str(caught.value)
    assert [p.name for p in (tmp_path / "run/state").iterdir()] == ["step-000002"]
    torch.manual_seed(5)
    resumed = run(place, tmp_path / "run", resume=True, **options)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert resumed.after == whole.after


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny mixture of experts: its folder and a text."""
    folder: Path = tmp_path_factory.mktemp("mixture")
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    build("nemotron_h", vocab_size=264, **ids).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    write_text(folder / "text.txt")
    return folder


def test_with_everything_stored_and_most_of_it_in_the_hosts_memory(
    mixture: Path, tmp_path: Path
) -> None:
    """The merged model is what the run ended with, and a resumed run loses nothing."""
    options: dict[str, Any] = {
        "quantize": "nf4", "quantize_modules": "all", "experts": "host", "activations": "offload",
        "target_modules": ("in_proj", "out_proj"),
    }  # fmt: skip
    whole = run(mixture, tmp_path / "whole", **options)
    with exhausted(EagerStep, "accumulate", call=3), pytest.raises(OutOfMemory, match="is saved"):
        run(mixture, tmp_path / "run", **options)
    resumed = run(mixture, tmp_path / "run", resume=True, **options)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert resumed.after == whole.after
    assert 0 < resumed.agreement.relative < 1e-5


def test_a_run_may_be_resumed_with_less_memory(place: Path, tmp_path: Path) -> None:
    whole = run(place, tmp_path / "whole", lora_dropout=0.2)
    with exhausted(EagerStep, "accumulate", call=2), pytest.raises(OutOfMemory):
        run(place, tmp_path / "run", lora_dropout=0.2)
    resumed = run(place, tmp_path / "run", resume=True, lora_dropout=0.2, activations="checkpoint")
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert resumed.after == whole.after


def test_in_the_backward_pass_of_the_first_step(place: Path, tmp_path: Path) -> None:
    with (
        exhausted(Tensor, "backward", call=1),
        pytest.raises(OutOfMemory, match=r"in forward and backward of 1 x 2 x 32 tokens.*step 0"),
    ):
        run(place, tmp_path / "run")
    assert run(place, tmp_path / "run", resume=True).steps == 4


def test_in_an_evaluation(place: Path, tmp_path: Path) -> None:
    from prodial_kernels.training.callbacks import events

    whole = run(place, tmp_path / "whole")
    with (
        exhausted(events, "evaluate_examples", call=2),
        pytest.raises(OutOfMemory, match=r"in an evaluation.*the state after step 4 is saved"),
    ):
        run(place, tmp_path / "run")
    assert run(place, tmp_path / "run", resume=True).after == whole.after


def test_a_half_updated_state_is_not_saved(place: Path, tmp_path: Path) -> None:
    options = {"save_every": 2}
    whole = run(place, tmp_path / "whole", **options)
    adamw = torch.optim.AdamW
    with (
        exhausted(adamw, "_init_group", call=7),
        pytest.raises(
            OutOfMemory, match=r"in the optimiser's update.*last good state is .*02"
        ) as e,
    ):
        run(place, tmp_path / "run", **options)
    assert not e.value.whole
    assert [p.name for p in (tmp_path / "run/state").iterdir()] == ["step-000002"]
    assert run(place, tmp_path / "run", resume=True, **options).after == whole.after


def test_the_command_line_says_how_to_go_on(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "run")
    arguments = [
        "finetune", "--model", str(place / "model"), "--data", str(place / "text.txt"),
        "--steps", "2", "--seq-len", "32", "--eval-tokens", "64", "--output", output,
    ]  # fmt: skip
    with exhausted(EagerStep, "accumulate", call=1):
        assert commands.main(arguments) == 1
    printed = capsys.readouterr().err
    assert "prodial: error: out of memory in forward and backward of 1 x 4 x 32 tokens" in printed
    assert f"continue with: prodial finetune --resume --output {output}" in printed
    assert (
        commands.main(["finetune", "--resume", "--output", output, "--activations", "checkpoint"])
        == 0
    )


class _Step:
    """Holds a large tensor in a frame when it fails, as a forward pass does."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[Tensor]] = []
        self.closed = 0

    def begin(self, parts: Any, lr: float) -> None:
        activation = torch.ones(1000)
        self.made.append(weakref.ref(activation))
        raise torch.OutOfMemoryError(f"no room for {activation.nbytes}\nand much more text")

    def finish(self) -> StepResult:
        raise torch.OutOfMemoryError("later")

    def close(self) -> None:
        self.closed += 1


def guarded() -> tuple[GuardedStep, _Step, nn.Parameter]:
    parameter = nn.Parameter(torch.ones(3))
    step = _Step()
    return GuardedStep(step, torch.optim.SGD([parameter], lr=0.1)), step, parameter


def batch() -> list[Batch]:
    ids = torch.zeros(2, 8, dtype=torch.int64)
    return [Batch(ids, ids)]


def test_a_failed_step_leaves_nothing_behind() -> None:
    step, inner, parameter = guarded()
    parameter.grad = torch.ones(3)
    before = torch.get_rng_state()
    with pytest.raises(OutOfMemory, match=r"out of memory .*2 x 8 tokens: no room for 4000$") as e:
        step.begin(batch(), 0.1)
    gc.collect()
    # The error is still there, as it is while a state is saved, but what the step made is not.
    assert inner.made[0]() is None
    assert e.value.__cause__ is None
    assert e.value.__context__ is None
    assert parameter.grad is None
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(OutOfMemory, match="in finishing the step: later"):
        step.finish()
    step.close()
    assert inner.closed == 1


def test_the_generator_is_put_back() -> None:
    step, inner, _ = guarded()
    state = torch.get_rng_state()

    def drawing(parts: Any, lr: float) -> None:
        torch.rand(5)
        raise torch.OutOfMemoryError("full")

    inner.begin = drawing  # type: ignore[method-assign]
    with pytest.raises(OutOfMemory):
        step.begin(batch(), 0.1)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_errors_pass() -> None:
    step, inner, _ = guarded()

    def broken(parts: Any, lr: float) -> None:
        raise ValueError("something else")

    inner.begin = broken  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="something else"):
        step.begin(batch(), 0.1)


def test_advice_where_nothing_was_planned() -> None:
    error = out_of_memory(torch.OutOfMemoryError("full"), "in an evaluation")
    text = str(error.explained("nothing was saved", None))
    assert text.startswith("out of memory in an evaluation: full; nothing was saved. Try ")
    assert "batch_size" in text
    planned = error.explained("nothing was saved", "What fits: quantize 'nf4' (3.00 GiB)")
    assert "What fits: quantize 'nf4' (3.00 GiB)." in str(planned)


def test_options_are_checked() -> None:
    assert FinetuneConfig(memory_budget=10**9).memory_budget == "1000000000"  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="memory_budget: expected a size such as '8GiB'"):
        FinetuneConfig(memory_budget="plenty")
    with pytest.raises(ConfigError, match="activations must be one of"):
        FinetuneConfig(activations="some")
    with pytest.raises(ConfigError, match="contradicts activations 'keep'"):
        FinetuneConfig(activations="keep", gradient_checkpointing=True)
    assert FinetuneConfig(gradient_checkpointing=True).chosen_activations == "checkpoint"


def test_blocks_are_themselves_again_when_a_run_is_over(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prodial_kernels.training import finetuning

    seen = []
    merge = finetuning.merge_prodial

    def noting(model: Any) -> Any:
        seen.append([type(block).__mro__[1].__name__ for block in model.backbone.layers])
        assert any(isinstance(module, ProdialLinear) for module in model.modules())
        return merge(model)

    monkeypatch.setattr(finetuning, "merge_prodial", noting)
    result = run(place, tmp_path / "run", steps=1, activations="checkpoint")
    assert seen == [["GradientCheckpointingLayer"] * 2]
    assert result.memory is None
