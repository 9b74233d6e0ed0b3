"""One row: adapt a copy of the base, train it, score it."""

from __future__ import annotations

import copy
import math
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.quality.bases.shapes import Base
from benchmarks.quality.methods.method import Unfit
from benchmarks.quality.methods.registry import adapt
from benchmarks.quality.study.language import LanguageData
from benchmarks.quality.study.row import Recipe, Row, Spec, finite
from benchmarks.quality.study.vision import VisionData
from benchmarks.quality.tasks.task import ImageTask, Task, TextTask

__all__ = ["Data", "data_of", "order_of", "run_row", "share_of_rate", "where"]

Data = LanguageData | VisionData


def data_of(base: Base, task: Task, recipe: Recipe, device: torch.device) -> Data:
    """Make a task ready for a base.

    Raises:
        ValueError: A task of the other kind.
    """
    if task.kind != base.kind:
        raise ValueError(f"task: {task.name} is {task.kind}, the base {base.name} {base.kind}")
    if isinstance(task, TextTask):
        return LanguageData(task, base.tokenizer, recipe.max_length, device)
    return VisionData(task, device)


def where(device: torch.device) -> dict[str, str]:
    """The device and the versions that a row was made with."""
    from importlib import metadata

    import prodial_kernels

    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else platform.machine()
    return {"device": name, "prodial-kernels": prodial_kernels.__version__, **versions}


def order_of(count: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Batches of indices: each example once an epoch; the last of an epoch goes on in the next."""
    generator = torch.Generator().manual_seed(seed)
    left: list[int] = []
    while True:
        while len(left) < batch:
            left += torch.randperm(count, generator=generator).tolist()
        yield left[:batch]
        left = left[batch:]


def run_row(
    base: Base,
    data: Data,
    spec: Spec,
    phase: str,
    device: torch.device,
    keep: Callable[[Any], None] = lambda model: None,
) -> Row:
    """Train and score one row; the base is left as it is.

    Args:
        base: Its model is on ``device``.
        data: Of the spec's task.
        spec: What to run.
        phase: ``"sweep"`` scores the validation split alone, ``"final"`` the test split too.
        device: Where to run.
        keep: Is given the trained model, for analyses.

    Returns:
        The row; a method that does not exist for the base, and a loss that is not finite, are
        rows with another status.
    """
    row = Row(spec, phase, where=where(device))
    # A seed gives a GPU's and the CPU's generator other numbers.
    model = copy.deepcopy(base.model).cpu()
    torch.manual_seed(spec.seed)
    classes = len(data.task.classes) if isinstance(data.task, ImageTask) else None
    try:
        row.figures.update(adapt(model, spec.method, spec.budget, classes))
    except Unfit as error:
        row.status, row.note = "unfit", str(error)
        return row
    model.to(device)
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    recipe = spec.recipe
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses: list[torch.Tensor] = []
    model.train()
    start = time.perf_counter()
    if parameters:
        optimizer = torch.optim.AdamW(
            parameters, lr=spec.learning_rate, weight_decay=recipe.weight_decay, fused=gpu
        )
        order = order_of(len(data), recipe.batch_size, spec.seed)
        for step in range(recipe.steps):
            rate = spec.learning_rate * share_of_rate(step, recipe)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
                loss = data.loss(model, data.batch(next(order)))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        if gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        last = torch.stack(losses[-max(1, len(losses) // 10) :]).float().mean().item()
        row.figures |= {
            "loss": round(last, 5),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(recipe.steps * recipe.batch_size * data.length / seconds, 1),
            "peak_bytes": torch.cuda.max_memory_allocated(device) if gpu else None,
        }
        if not finite(row):
            return row
    model.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
        row.figures["validation"] = data.accuracy(model, "validation", recipe.limit)
        if phase == "final":
            row.figures["test"] = data.accuracy(model, "test", recipe.limit)
    keep(model)
    return row


def share_of_rate(step: int, recipe: Recipe) -> float:
    """Of the peak rate: linear warm-up, then a cosine that ends at zero."""
    warm = max(1, round(recipe.warmup * recipe.steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, recipe.steps - warm)
    return 0.5 * (1 + math.cos(math.pi * done))
