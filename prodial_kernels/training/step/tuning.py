"""Upstream's Mamba-2 kernels choose among configurations at first use: made to, before a run.

Each of mamba_ssm's Triton kernels times dozens of configurations when it first meets a kind of
input, up to a minute in all, with 256 MiB of the device's memory beside its tensors. Within a
first step these come on top of everything that the step holds, and its time spoils the estimate of
the rest. What they choose by are widths and dtypes, neither batch nor length, so a mixer that runs
alone on one sequence settles it for the run.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import nn

from prodial_kernels.models.methods.mixer_parts import mixers_of

TIMING_BYTES = 256 * 2**20
"""What Triton clears between two timings, so that nothing is in the L2 cache."""
LEAST_TOKENS = 256
"""The fewest to choose by: a chunk of the scan."""


def upstream_tuners() -> list[Any]:
    """Every kernel of mamba_ssm that was imported and chooses among configurations."""
    # Without mamba_ssm there may be no Triton.
    names = [name for name in list(sys.modules) if name.startswith("mamba_ssm.")]
    if not names:
        return []
    from triton.runtime.autotuner import Autotuner

    found: dict[int, Any] = {}
    for name in names:
        for value in vars(sys.modules[name]).values():
            # Heuristics may be wrapped around it.
            while value is not None and not isinstance(value, Autotuner):
                value = getattr(value, "fn", None) if hasattr(value, "run") else None
            if value is not None:
                found[id(value)] = value
    return list(found.values())


def is_tuned() -> bool:
    """Whether upstream's kernels have nothing to choose."""
    return not any(len(tuner.configs) > 1 for tuner in upstream_tuners())


def tune(model: nn.Module, tokens: int) -> float:
    """Run each kind of Mamba-2 mixer alone, in evaluation and in training; return the seconds.

    Neither gradients nor the random generator's state change.

    Args:
        model: On its device, with its adapters.
        tokens: Of the one sequence that they run on.
    """
    started = time.perf_counter()
    seen = set()
    for _, mixer in mixers_of(model):
        width = mixer.in_proj.in_features
        kind = (type(mixer), mixer.A_log.shape, width)
        if mixer.A_log.ndim != 1 or kind in seen:
            continue
        seen.add(kind)
        # The one weight of every mixer that is never stored in fewer bits.
        like = mixer.conv1d.weight
        before = mixer.training
        devices = [like.device] if like.is_cuda else []
        with torch.random.fork_rng(devices):
            x = torch.full((1, tokens, width), 0.5, dtype=like.dtype, device=like.device)
            mixer.eval()
            with torch.inference_mode():
                mixer(x)
            mixer.train()
            y = mixer(x.requires_grad_())
            y = y if isinstance(y, torch.Tensor) else y[0]
            torch.autograd.grad(y, x, torch.ones_like(y))
            mixer.train(before)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
