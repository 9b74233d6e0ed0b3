"""How long: replays of CUDA graphs on the device, and the host's time beside them.

On a CPU the steps are run as they are, which is enough to try the suite out.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

MIN_SAMPLE_S = 3e-3
# A graph of fewer steps can be over before the next one is launched.
LEAST_STEPS = 4


@dataclass(frozen=True)
class Summary:
    """Median and 20th and 80th percentile of one variant's samples, µs for one step."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        """Summarise at least one sample."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered), ordered[math.floor(0.2 * last)],
            ordered[math.ceil(0.8 * last)], len(ordered),
        )  # fmt: skip

    @property
    def spread(self) -> float:
        """Width between the percentiles, as a fraction of the median."""
        return (self.high - self.low) / self.median


def warm_up(steps: Sequence[Callable[[], None]]) -> None:
    """Run steps on a stream of their own, as must be done before they are recorded."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in steps:
            step()
    torch.cuda.current_stream().wait_stream(side)


class Replay:
    """Steps that take turns, one after the other: recorded once as a CUDA graph, then replayed.

    Each step has its own operands, so that by its next turn the others have pushed them out of
    the cache, as other layers do in a model.

    Args:
        steps: What to run; each must have run before, so that nothing compiles while recording.
        device: ``"cuda"`` or ``"cpu"``.
        pool: Memory that the graphs of one comparison share; none of them reads another's.
    """

    def __init__(
        self, steps: Sequence[Callable[[], None]], device: str, pool: object = None
    ) -> None:
        self.cuda = device.startswith("cuda")
        self.steps = list(steps) * -(-LEAST_STEPS // len(steps))
        self.graph: torch.cuda.CUDAGraph | None = None
        # Counted at the first sample: the device may be busy with other things until then.
        self.repeats = 0
        if self.cuda:
            self._record(pool)

    def sample(self) -> float:
        """Return the time of one step in µs, averaged over at least 3 ms of replays."""
        if not self.cuda:
            return self._once() * 1e6 / len(self.steps)
        if self.repeats == 0:
            self.repeats = max(1, math.ceil(MIN_SAMPLE_S / self._once()))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self.repeats):
            self.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1000 / (self.repeats * len(self.steps))

    def run(self) -> None:
        """Run every step once, without waiting for the device."""
        if self.graph is not None:
            self.graph.replay()
            return
        for step in self.steps:
            step()

    def _record(self, pool: object) -> None:
        warm_up(self.steps[:2])
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer one, as a recording that fails leaves its stream the current one.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=pool),  # type: ignore[arg-type]
            ):
                for step in self.steps:
                    step()
        except RuntimeError as error:
            # What is raised says that something went wrong before; this says what.
            first = error.__context__ or error
            raise RuntimeError(f"while recording: {type(first).__name__}: {first}") from error
        self.graph = graph
        self.run()

    def _once(self) -> float:
        """Seconds for one round, the host waiting for the device."""
        synchronise(self.cuda)
        start = time.perf_counter()
        self.run()
        synchronise(self.cuda)
        return time.perf_counter() - start


def interleave(
    replays: Mapping[str, Replay], rounds: int, warm_s: float = 0.2
) -> dict[str, list[float]]:
    """Sample every variant once a round, in a new random order each round.

    What drifts (clocks, temperature, neighbours) then meets all variants alike. The device is
    kept busy for ``warm_s`` seconds first, so that its clocks are up.
    """
    order = list(replays)
    samples: dict[str, list[float]] = {name: [] for name in order}
    until = time.perf_counter() + warm_s
    while order and time.perf_counter() < until:
        replays[order[0]].sample()
    shuffler = random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            samples[name].append(replays[name].sample())
    return samples


def eager_time(step: Callable[[], None], device: str, budget_s: float = 0.3) -> float:
    """Return the wall time of one step in µs as a training loop sees it, launches included."""
    cuda = device.startswith("cuda")
    step()
    synchronise(cuda)
    count, start = 0, time.perf_counter()
    while count < 2 or (count < 30 and time.perf_counter() - start < budget_s):
        step()
        count += 1
    synchronise(cuda)
    return (time.perf_counter() - start) / count * 1e6


def host_time(step: Callable[[], None], device: str, budget_s: float = 0.3) -> float:
    """Return the host's own time for one step in µs.

    The median of bursts of two steps that start with an idle device: in a longer run the queue
    of launches fills up, and the host's time becomes the device's.
    """
    cuda = device.startswith("cuda")
    bursts: list[float] = []
    until = time.perf_counter() + budget_s
    while len(bursts) < 2 or (len(bursts) < 200 and time.perf_counter() < until):
        synchronise(cuda)
        start = time.perf_counter()
        step()
        step()
        bursts.append((time.perf_counter() - start) / 2 * 1e6)
    synchronise(cuda)
    return statistics.median(bursts)


def synchronise(cuda: bool) -> None:
    """Wait for the device, if there is one."""
    if cuda:
        torch.cuda.synchronize()
