"""What two processes train with captured blocks; see ``tests/captured/test_capture_ddp.py``."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers.models.mamba2.modeling_mamba2  # noqa: F401  # before the processes fork
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from prodial_kernels.captured.model import capture_with
from support.captured.models import LAYERS, adapted
from support.captured.standin import StandIn
from support.models import token_ids

STEPS = 4

ALIVE: list[Any] = []
"""Models until their process ends: freeing one beside gloo's threads sometimes never returns."""


def rank() -> int:
    """The number of this process."""
    return int(os.environ["RANK"])


def trained(
    model: nn.Module, wrapped: nn.Module, batches: list[list[Tensor]]
) -> tuple[list[float], list[Tensor]]:
    """Losses and parameters of steps of several micro-batches each, reduced after the last."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.5)
    losses = []
    for micro in batches:
        for number, ids in enumerate(micro):
            last = number == len(micro) - 1
            silent: AbstractContextManager[Any] = nullcontext()
            if isinstance(wrapped, DistributedDataParallel) and not last:
                silent = wrapped.no_sync()
            with silent:
                loss = wrapped(input_ids=ids, labels=ids, use_cache=False).loss / len(micro)
                loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses, [p.detach().clone() for p in parameters]


def compared(accumulation: int = 1, *, early: bool = False, **options: Any) -> dict[str, Any]:
    """Captured steps in DDP beside plain ones, each process on its own rows."""
    distributed.init_process_group("gloo")
    batches = [
        [token_ids(seed=100 * rank() + 10 * step + n) for n in range(accumulation)]
        for step in range(STEPS)
    ]
    model = adapted()
    plain = copy.deepcopy(model)
    beside = DistributedDataParallel(plain, **options)
    ALIVE.append(beside)
    expected = trained(plain, beside, batches)
    engine = StandIn()
    if early:
        captured = capture_with(model, engine)
        wrapped = DistributedDataParallel(model, **options)
    else:
        wrapped = DistributedDataParallel(model, **options)
        captured = capture_with(wrapped, engine)
    found = trained(model, wrapped, batches)
    captured.release()
    pairs = zip(found[1], expected[1], strict=True)
    mine = torch.cat([p.flatten() for p in found[1]])
    others = [torch.empty_like(mine) for _ in range(2)]
    distributed.all_gather(others, mine)
    ALIVE.append(wrapped)
    return {
        "losses": found[0] == expected[0],
        "parameters": all(torch.equal(one, other) for one, other in pairs),
        "alike": torch.equal(*others),
        "replayed": engine.backwards == LAYERS * (STEPS * accumulation - 2),
    }


CASES: dict[str, Callable[[Path], Any]] = {
    "captured before it is wrapped": lambda _: compared(early=True),
    "accumulated": lambda _: compared(2),
    "views of buckets": lambda _: compared(gradient_as_bucket_view=True),
    "unused parameters": lambda _: compared(find_unused_parameters=True),
    "static graph": lambda _: compared(static_graph=True),
}
