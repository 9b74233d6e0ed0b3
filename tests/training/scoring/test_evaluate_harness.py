"""The call to lm-evaluation-harness, by a stand-in for its module."""

from __future__ import annotations

import sys
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from prodial_kernels.models.loading.load import LoadedModel
from prodial_kernels.training.evaluating import assess_with_harness
from prodial_kernels.training.scoring.lm_eval import check_tasks, run_lm_eval
from prodial_kernels.training.scoring.log_likelihood import EvaluationError
from support.models import build
from support.tiny_model import byte_tokenizer


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "merged, final"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


def install(monkeypatch: pytest.MonkeyPatch, output: Any) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    module = ModuleType("lm_eval")

    def simple_evaluate(**arguments: Any) -> Any:
        calls.append(arguments)
        if isinstance(output, Exception):
            raise output
        return output

    module.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    return calls


@pytest.mark.parametrize(("biased", "batch_size"), [(False, 4), (True, 1)])
def test_a_model_with_a_bias_before_its_convolution_gets_no_padding(
    biased: bool, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness pads on the left for tasks that generate, and does not say beforehand."""
    model = build("mamba2", use_bias=biased)
    loaded = LoadedModel("tiny", model, byte_tokenizer())
    calls = install(monkeypatch, {"results": {"gsm8k": {"exact_match,none": 1}}})
    assessment = assess_with_harness(loaded, ["gsm8k"], batch_size=4)
    assert [call["batch_size"] for call in calls] == [batch_size]
    assert len(assessment.notes) == biased
    assert assessment.metrics == {"gsm8k": {"exact_match": 1.0}}


def test_arguments_and_results(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    results = {
        "arc_easy": {
            "alias": "arc_easy",
            "acc,none": 0.5,
            "acc_stderr,none": "N/A",
            "acc_norm,none": 0.25,
        },
        "gsm8k": {"exact_match,strict-match": 1, "sample_len": 10},
    }
    calls = install(monkeypatch, {"results": results, "config": {}})
    metrics = run_lm_eval(
        model_dir, ("arc_easy", "gsm8k"), batch_size=4, device="cpu", limit=10, num_fewshot=2
    )
    assert metrics == {
        "arc_easy": {"acc": 0.5, "acc_norm": 0.25},
        "gsm8k": {"exact_match,strict-match": 1.0},
    }
    (call,) = calls
    assert call["model"] == "hf"
    assert call["model_args"] == {"pretrained": str(model_dir)}
    assert call["tasks"] == ["arc_easy", "gsm8k"]
    assert (call["batch_size"], call["device"], call["limit"]) == (4, "cpu", 10)
    assert call["num_fewshot"] == 2


def test_device_by_default(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    calls = install(monkeypatch, {"results": {"arc_easy": {"acc,none": 0.5}}})
    for available, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr("torch.cuda.is_available", lambda available=available: available)
        run_lm_eval(model_dir, ["arc_easy"])
        assert calls[-1]["device"] == device


def test_not_installed(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaluationError, match=r"pip install 'lm-eval\[hf\]'"):
        run_lm_eval(model_dir, ["arc_easy"])


def test_failures_keep_their_cause(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    install(monkeypatch, KeyError("no_such_task"))
    with pytest.raises(EvaluationError, match="failed on no_such_task: KeyError") as caught:
        run_lm_eval(model_dir, ["no_such_task"])
    assert isinstance(caught.value.__cause__, KeyError)
    install(monkeypatch, None)
    with pytest.raises(EvaluationError, match="gave no results for arc_easy"):
        run_lm_eval(model_dir, ["arc_easy"])


def test_misspelt_tasks_are_found_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path
) -> None:
    calls = install(monkeypatch, {"results": {"of_my_own": {"acc,none": 1.0}}})
    tasks = ModuleType("lm_eval.tasks")
    known = ["arc_easy", "arc_challenge", "hellaswag"]

    class TaskManager:
        def __init__(self, include_path: str | None = None) -> None:
            self.all_tasks = known if include_path is None else [*known, Path(include_path).name]

        def match_tasks(self, names: list[str]) -> list[str]:
            return [task for task in self.all_tasks for name in names if fnmatch(task, name)]

    tasks.TaskManager = TaskManager  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    check_tasks(["arc_easy", "arc_*", "my_own.yaml"])
    with pytest.raises(EvaluationError, match=r"no task 'helaswag'; .*did you mean 'hellaswag'\?"):
        check_tasks(["arc_easy", "helaswag"])
    own = model_dir / "of_my_own"
    with pytest.raises(EvaluationError, match=r"include_path .*of_my_own' is no folder of tasks"):
        check_tasks(["of_my_own"], own)
    own.mkdir()
    check_tasks(["of_my_own", "arc_easy"], own)
    run_lm_eval(model_dir, ["of_my_own"], include_path=own)
    assert calls[0]["task_manager"].all_tasks == [*known, "of_my_own"]


def test_directory_without_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = install(monkeypatch, {})
    with pytest.raises(EvaluationError, match=r"no config.json there.*merge the adapter"):
        run_lm_eval(tmp_path, ["arc_easy"])
    assert not calls


def test_tasks_are_a_list_of_names(model_dir: Path) -> None:
    with pytest.raises(TypeError, match=r"use \['arc_easy'\]"):
        run_lm_eval(model_dir, "arc_easy")
    with pytest.raises(ValueError, match="at least one task"):
        run_lm_eval(model_dir, [])
