"""Compiles the launches of a single kernel's script without a GPU, and says what breaks a rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from support.kernels.launch_recorder import DEVICES, Launch, Recorder

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def check_all(
    record: Callable[[torch.dtype, Any], None],
    problems: Callable[[Launch], list[str]],
    *,
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[Any],
    each: int,
) -> int:
    """Print every problem of every launch; 1 where there is one.

    Args:
        record: Launches a kernel's variants for a dtype and a shape; the launches' ``origin``.
        problems: What is wrong with a launch.
        dtypes: The first on every architecture, the others on Hopper.
        shapes: What ``record`` takes: the first on every architecture, the others on Hopper and
            Blackwell, whose code is of a kind of its own.
        each: Launches that one call of ``record`` makes.
    """
    launches: list[Launch] = []
    calls = 0
    for arch, dtype, shape in itertools.product(ARCHITECTURES, dtypes, shapes):
        if arch != 90 and (dtype is not dtypes[0] or (arch != 100 and shape != shapes[0])):
            continue
        recorder = Recorder()
        recorder.origin = (dtype, shape)
        with recorder.on(DEVICES[arch]):
            record(dtype, shape)
        launches += recorder.launches
        calls += 1
    if len(launches) != each * calls:
        print(f"{len(launches)} launches were recorded, expected {each * calls}")
        return 1
    failed = 0
    for launch in launches:
        for problem in problems(launch):
            failed = 1
            print(f"{launch.title} {launch.origin}: {problem}")
    return failed


def ptx_of(launch: Launch) -> list[str]:
    """The lines of the assembly that a launch compiles to."""
    target = GPUTarget("cuda", launch.device.arch, 32)
    compiled = triton.compile(launch.source, target=target, options=launch.options)
    lines: list[str] = compiled.asm["ptx"].splitlines()
    return lines
