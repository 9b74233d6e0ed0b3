"""Where the time goes: the device time of each kernel of one step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import synchronise


def kernel_times(step: Callable[[], None], device: str, repeats: int = 5) -> dict[str, float]:
    """Return µs per step by kernel, largest first; on a CPU by operator."""
    cuda = device.startswith("cuda")
    step()
    synchronise(cuda)
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        for _ in range(repeats):
            step()
        synchronise(cuda)
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        took = event.self_device_time_total if cuda else event.self_cpu_time_total
        if took > 0:
            times[short_name(event.key)] += took / repeats
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def short_name(kernel: str) -> str:
    """A kernel's name without its template arguments and namespaces, at most 48 characters."""
    head = kernel.split("<")[0].split("(")[0].removeprefix("void ")
    return head.split("::")[-1].strip()[:48] or kernel[:48]
