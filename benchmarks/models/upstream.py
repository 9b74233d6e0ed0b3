"""The configurations that mamba_ssm's Triton kernels choose among when they first run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.harness.rows import Unavailable
from prodial_kernels.training.step.tuning import upstream_tuners


def load(configurations: int) -> None:
    """Import upstream's kernels, and let those that tune themselves choose among a few.

    Raises:
        Unavailable: They are not installed.
    """
    # Read when Triton is imported.
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    try:
        import causal_conv1d  # noqa: F401
        import mamba_ssm.ops.selective_scan_interface
        import mamba_ssm.ops.triton.ssd_combined  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"{error} (pip install 'prodial-kernels[mamba]')") from None
    limit_configurations(configurations)


def limit_configurations(count: int) -> None:
    """Let each of upstream's kernels choose among so many of its configurations, evenly spread.

    The same for the floor and for what is measured against it.
    """
    for tuner in upstream_tuners():
        if 0 < count < len(tuner.configs):
            step = (len(tuner.configs) - 1) / max(1, count - 1)
            tuner.configs = [tuner.configs[round(i * step)] for i in range(count)]


@contextmanager
def one_configuration(number: int) -> Iterator[None]:
    """Leave each of upstream's kernels its configuration of this number, counted round."""
    tuners = upstream_tuners()
    before = [list(tuner.configs) for tuner in tuners]
    for tuner, configs in zip(tuners, before, strict=True):
        tuner.configs = [configs[number % len(configs)]]
    try:
        yield
    finally:
        for tuner, configs in zip(tuners, before, strict=True):
            tuner.configs = configs


def notes(configurations: int) -> list[str]:
    """What a reader of a result with :func:`limit_configurations` must know."""
    if configurations == 0:
        return []
    return [
        f"Upstream's Mamba-2 kernels chose among {configurations} of their configurations, in the "
        "floor and everywhere."
    ]
