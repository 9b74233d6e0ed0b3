"""Where the time of a step goes, by kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.timing import synchronise


@dataclass(frozen=True)
class Kernel:
    """One kernel of a step (on a CPU an operator): its name, µs and launches a step."""

    name: str
    us: float
    count: float


def kernels_of(step: Callable[[], None], device: str, repeats: int = 1) -> list[Kernel]:
    """Profile ``repeats`` steps (on a CPU one) after one that is not; the longest kernel first."""
    cuda = device.startswith("cuda")
    repeats = repeats if cuda else 1
    step()
    synchronise(cuda)
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        for _ in range(repeats):
            step()
        synchronise(cuda)
    return kernels_in(profiler, repeats, cuda=cuda)


def kernels_in(profiler: profile, steps: int, *, cuda: bool) -> list[Kernel]:
    """What a profiler saw in so many steps; the longest kernel first."""
    found = []
    for event in profiler.key_averages():
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if us > 0:
            found.append(Kernel(event.key, us / steps, event.count / steps))
    return sorted(found, key=lambda kernel: -kernel.us)


def kernel_times(step: Callable[[], None], device: str, repeats: int = 5) -> dict[str, float]:
    """µs a step by the kernels' short names, the longest first."""
    times: dict[str, float] = {}
    for kernel in kernels_of(step, device, repeats):
        name = short_name(kernel.name)
        times[name] = times.get(name, 0.0) + kernel.us
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def short_name(kernel: str) -> str:
    """A kernel's name without its template arguments and namespaces, at most 48 characters."""
    head = kernel.split("<")[0].split("(")[0].removeprefix("void ")
    return head.split("::")[-1].strip()[:48] or kernel[:48]
