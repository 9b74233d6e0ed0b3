"""Published benchmarks through lm-evaluation-harness, where it is installed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prodial_kernels._checks import did_you_mean
from prodial_kernels.training.scoring.log_likelihood import EvaluationError


def run_lm_eval(
    model_dir: str | os.PathLike[str],
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    batch_size: int | str = 8,
    device: str | None = None,
    limit: int | float | None = None,
    include_path: str | os.PathLike[str] | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluate a saved plain model (adapters merged) on tasks of lm-evaluation-harness.

    Args:
        model_dir: Directory with the model and its tokenizer, as ``save_pretrained`` writes them.
        tasks: Names of tasks, such as ``["hellaswag", "arc_easy"]``.
        num_fewshot: Examples before each question; ``None`` for the task's own number.
        batch_size: Requests in a forward pass, or ``"auto"``.
        device: Such as ``"cpu"`` or ``"cuda:0"``; ``None`` for CUDA where there is any, else CPU.
        limit: Questions of each task (an integer), or their share (under 1); ``None`` for all.
        include_path: A folder with tasks and groups of one's own, which ``tasks`` may name then.

    Returns:
        For each task (and group), its metrics by name, such as ``{"arc_easy": {"acc": 0.43,
        "acc_stderr": 0.01, ...}}``.

    Raises:
        EvaluationError: The harness is not installed, there is no model in the directory, or the
            harness fails: its own error is the cause.
        TypeError: ``tasks`` is a single string.
        ValueError: No tasks.
    """
    if isinstance(tasks, str):
        raise TypeError(f"tasks must be a sequence of names, got one string; use [{tasks!r}]")
    if not tasks:
        raise ValueError("tasks must name at least one task, such as ['hellaswag']")
    directory = Path(model_dir)
    if not (directory / "config.json").is_file():
        raise EvaluationError(
            f"{directory}: no config.json there, so it is no saved model; merge the adapter into "
            "its model and give the directory that this writes"
        )
    lm_eval = _library()
    own = {} if include_path is None else {"task_manager": _task_manager(include_path)}
    try:
        output = lm_eval.simple_evaluate(
            model="hf",
            # As a mapping: in the string form a comma in the path would begin a new argument.
            model_args={"pretrained": str(directory)},
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            # The harness's own default is CUDA, whether there is any or not.
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            limit=limit,
            log_samples=False,
            **own,
        )
    # Unknown tasks, unreachable data sets and failing models each raise classes of their own.
    except Exception as error:
        raise EvaluationError(
            f"lm-evaluation-harness failed on {', '.join(tasks)}: {type(error).__name__}: {error}"
        ) from error
    if not output or not output.get("results"):
        raise EvaluationError(f"lm-evaluation-harness gave no results for {', '.join(tasks)}")
    return {
        task: {
            # "acc,none" is acc: a filter that says nothing.
            name.removesuffix(",none"): float(value)
            for name, value in metrics.items()
            # Metrics are named "metric,filter"; everything else describes the task.
            if "," in name and isinstance(value, (int, float))
        }
        for task, metrics in output["results"].items()
    }


def check_tasks(tasks: Sequence[str], include_path: str | os.PathLike[str] | None = None) -> None:
    """Raise EvaluationError unless lm-evaluation-harness is installed and knows the tasks.

    ``include_path`` is a folder with further ones. The message names the task that may be meant.
    """
    _library()
    manager = _task_manager(include_path)
    for task in tasks:
        # A file describes a task of the user's own; a pattern may name several.
        if task.endswith((".yaml", ".yml")) or manager.match_tasks([task]):
            continue
        raise EvaluationError(
            f"lm-evaluation-harness has no task {task!r}; 'lm-eval ls tasks' lists them"
            f"{did_you_mean(task, manager.all_tasks)}"
        )


def _task_manager(include_path: str | os.PathLike[str] | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluationError(
            f"lm-evaluation-harness lacks a library ({error}): pip install 'lm-eval[hf]'"
        ) from error
    if include_path is None:
        return TaskManager()
    if not Path(include_path).is_dir():
        raise EvaluationError(f"include_path {os.fspath(include_path)!r} is no folder of tasks")
    return TaskManager(include_path=os.fspath(include_path))


def _library() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise EvaluationError(
            "these tasks need lm-evaluation-harness: pip install 'lm-eval[hf]'"
        ) from error
    return lm_eval
