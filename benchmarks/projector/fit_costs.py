"""Measure what the plans' costs stand for, and print each beside the value in ``choices/costs.py``.

``python -m benchmarks.projector.fit_costs`` takes about three minutes on one GPU with Hopper's
tiles; ``--device cpu`` tries the script out on sizes that say nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from benchmarks.harness.startup import prepare_process

prepare_process()

import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.harness.timing import Replay  # noqa: E402
from prodial_kernels.kernels.choices.backward_plan import PRODUCT_TILES  # noqa: E402
from prodial_kernels.kernels.choices.costs import COSTS, Costs  # noqa: E402
from prodial_kernels.kernels.choices.tile_sizes import (  # noqa: E402
    TALL,
    WIDE,
    GemmConfig,
    InputSideConfig,
    OutputSideConfig,
    choose_output_side,
)
from prodial_kernels.kernels.projector.gemm import launch_gemm  # noqa: E402
from prodial_kernels.kernels.projector.input_sums import InputSums, launch_input_sums  # noqa: E402
from prodial_kernels.kernels.projector.operands import (  # noqa: E402
    Gradients,
    Needs,
    Operands,
    ProjectionOptions,
)
from prodial_kernels.kernels.projector.output_side import launch_output_side  # noqa: E402
from prodial_kernels.kernels.projector.output_sums import OutputSums  # noqa: E402
from prodial_kernels.kernels.projector.passes import device_limits  # noqa: E402
from prodial_kernels.kernels.projector.prepare import launch_low_rank, launch_prepare  # noqa: E402
from prodial_kernels.kernels.projector.reduce import launch_reduce  # noqa: E402
from prodial_kernels.kernels.replay.recorder import fork, join  # noqa: E402
from prodial_kernels.kernels.replay.streams import SideStream  # noqa: E402

OPTIONS = ProjectionOptions("triton", lora_scaling=1.0)
SUMS = Needs(False, False, False, True, False, True, False)
Step = Callable[..., Any]


class Sizes(NamedTuple):
    """What is measured: lengths of a product's sum, rounds of tiles, tokens of a walk, a weight."""

    sums: tuple[int, int] = (1024, 4096)
    rounds: tuple[int, int] = (1, 4)
    walks: tuple[int, int] = (16, 64)
    tile_columns: int = 4
    weight: int = 8192
    small: tuple[int, int] = (768, 1536)
    side: int = 22


TINY = Sizes((32, 64), (1, 2), (1, 2), 1, 64, (16, 32), 2)


class Bench:
    """Times of the kernels on one device, in µs."""

    def __init__(self, device: str, sizes: Sizes) -> None:
        self.device, self.sizes = device, sizes
        self.dtype = torch.bfloat16 if device.startswith("cuda") else torch.float16
        self.place = torch.empty(0, device=device).device
        self.processors = device_limits(self.place).processors

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A random matrix; the values change no time but that of a walk that meets a NaN."""
        return torch.randn(*shape, device=self.device).to(dtype or self.dtype)

    def alone(self, *steps: Step) -> float:
        """µs of a step; several take turns, so that none finds its operands in a cache."""
        for step in steps:
            step()
        replay = Replay(steps, self.device)
        return statistics.median(replay.sample() for _ in range(7))

    def together(self, main: Step, side: Callable[[SideStream | None], Any]) -> tuple[float, float]:
        """µs of two steps that begin at the same time, the second on a side stream."""
        if not self.device.startswith("cuda"):
            return self.alone(main), self.alone(lambda: side(None))
        samples = []
        for _ in range(12):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
            torch.cuda.synchronize()
            torch.cuda._sleep(1_000_000)  # the host queues everything meanwhile
            stream = fork(self.place)
            marks[0].record()
            main()
            marks[1].record()
            marks[2].record(stream.stream)
            side(stream)
            marks[3].record(stream.stream)
            join(stream, self.place)
            torch.cuda.synchronize()
            samples.append((marks[0].elapsed_time(marks[1]), marks[2].elapsed_time(marks[3])))
        both, other = (statistics.median(column) * 1e3 for column in zip(*samples[2:], strict=True))
        return both, other

    def product(
        self, config: GemmConfig, n: int, rounds: int, *, rank: int = 0, forward: bool = False,
        programs: int | None = None,
    ) -> Step:  # fmt: skip
        """A product that sums along n, in so many rounds of tiles on ``programs`` processors."""
        programs = programs or self.processors
        columns = self.sizes.tile_columns
        m = config.block_m * -(-rounds * programs // columns)
        k = config.block_n * columns
        left, out = self.empty(m, n), self.empty(m, k)
        right = self.empty(k, n) if forward else self.empty(n, k)
        inner = self.empty(rank, n) if rank else None
        config = replace(config, programs=programs)
        return lambda: launch_gemm(
            left, right, out, v_transposed=forward, config=config, inner=inner
        )

    def line(self, config: GemmConfig) -> tuple[float, float]:
        """(launch, µs for 1,000 of the sum) of a flattened product, by least squares."""
        points = [
            (rounds * n / 1e3, self.alone(self.product(config, n, rounds)))
            for n in self.sizes.sums for rounds in self.sizes.rounds
        ]  # fmt: skip
        slope, intercept = statistics.linear_regression(*zip(*points, strict=True))
        return intercept, slope

    def walk(self, tiles: int, r_pad: int, config: OutputSideConfig) -> list[Step]:
        """The output side, one item a program, each of so many tiles of tokens."""
        m, n = tiles * config.block_m * config.items, config.block_n
        needs, steps = SUMS, []
        for _ in range(3):
            dy, y, low = self.empty(m, n), self.empty(m, n), self.empty(m, r_pad)
            operands = Operands(
                y, scale_deviation=self.empty(n, dtype=torch.float32),
                lora_b=self.empty(n, r_pad, dtype=torch.float32),
            )  # fmt: skip

            def step(
                side: SideStream | None = None, dy: Tensor = dy, y: Tensor = y, low: Tensor = low,
                operands: Operands = operands,
            ) -> Any:  # fmt: skip
                return launch_output_side(
                    dy, y, low, operands, OPTIONS, needs, config=config, side=side
                )

            steps.append(step)
        return steps


def product_costs(bench: Bench) -> dict[str, Any]:
    """Steps, launches, ends of tiles and fused low-rank products."""
    found: dict[str, Any] = {}
    n, rounds = bench.sizes.sums[1], bench.sizes.rounds[1]
    launches, rates = [], {}
    for name, tile in PRODUCT_TILES.items():
        launch, step = bench.line(tile.plain)
        launches.append(launch)
        found[f"{name}_step"] = step
        one = rounds * step * n / 1e3
        shares = [
            (bench.alone(bench.product(tile.fused, n, rounds, rank=rank)) - launch) / one - 1
            for rank in (16, 64)
        ]
        by_rank = (shares[1] - shares[0]) / 3
        found[f"{name}_low_rank"] = (shares[0] - by_rank, by_rank)
        rates[name] = bench.line(replace(tile.fused, num_stages=WIDE.num_stages))[1]
    forward = {
        config: bench.alone(bench.product(replace(config, flatten=True), n, rounds, forward=True))
        for config in (WIDE, TALL)
    }
    found["launch"] = statistics.mean(launches)
    found["tall_round"] = (forward[TALL] - found["launch"]) / (forward[WIDE] - found["launch"])
    plain = PRODUCT_TILES["tall"].plain
    flat, ended = (
        bench.alone(bench.product(replace(plain, flatten=flatten), n, rounds))
        for flatten in (True, False)
    )
    found["tile_end"] = (ended - flat) / rounds
    return found


def walk_costs(bench: Bench, launch: float) -> dict[str, Any]:
    """The sums over the tokens: tiles, their beginnings and ends, rank 64, one more split."""
    short, long = bench.sizes.walks
    slopes, ends = {}, 0.0
    for r_pad in (16, 64):
        config = OutputSideConfig(64, 128, 8, 3, bench.sizes.side, bench.sizes.side, True)
        less, more = (bench.alone(*bench.walk(tiles, r_pad, config)) for tiles in (short, long))
        slopes[r_pad] = (more - less) / (long - short)
        if r_pad == 16:
            ends = (less - launch) / slopes[16] - short
    n, k = bench.sizes.small
    reduced = {}
    for splits in (8, 32):
        part = bench.empty(splits, n, 16, dtype=torch.float32)
        b = bench.empty(n, 16, dtype=torch.float32)
        operands = Operands(bench.empty(n, k), lora_a=bench.empty(16, k), lora_b=b)
        reduced[splits] = bench.alone(
            partial(
                launch_reduce, OutputSums(b=part), InputSums(), Gradients(lora_b=b), operands,
                OPTIONS,
            )
        )  # fmt: skip
    return {
        "walk_tile": slopes[16], "walk_rank": slopes[64] / slopes[16] - 1, "walk_ends": ends,
        "walk_split": (reduced[32] - reduced[8]) / 24 / slopes[16],
    }  # fmt: skip


def memory_costs(bench: Bench, launch: float) -> dict[str, Any]:
    """The launch before a product, and separate low-rank passes."""

    def scaling(n: int, k: int) -> Step:
        operands = Operands(bench.empty(n, k), scale_deviation=bench.empty(n, dtype=torch.float32))
        return lambda: launch_prepare(operands, OPTIONS, r_pad=16)

    side, n = bench.sizes.weight, bench.sizes.sums[1]
    memory = 4 * side * side / bench.alone(scaling(side, side))
    rows, columns = bench.sizes.small
    prepare = bench.alone(scaling(rows, columns)) - 4 * rows * columns / memory

    def low_rank(m: int) -> Step:
        dy, b = bench.empty(m, n), bench.empty(n, 16, dtype=torch.float32)
        return partial(launch_low_rank, dy, b, OPTIONS, 16)

    everything = 2 * side * n / (bench.alone(low_rank(side)) - launch)
    # On the processors that a long product leaves.
    left = bench.sizes.side
    long = bench.product(
        PRODUCT_TILES["wide"].fused, 2 * n, 4 * bench.sizes.rounds[1], rank=16,
        programs=bench.processors - left,
    )  # fmt: skip
    m = max(16, bench.sizes.side * 64)
    _, beside = bench.together(long, low_rank(m))
    return {
        "memory": memory, "prepare": prepare, "low_rank_all": everything,
        "low_rank_one": 2 * m * n / (beside - launch) / left,
    }  # fmt: skip


def stream_costs(bench: Bench) -> dict[str, Any]:
    """A second stream, a product that shares its processors, and reduce without PDL."""
    n, rounds = bench.sizes.sums[0], bench.sizes.rounds[1]
    found: dict[str, Any] = {}
    shares = []
    for name, tile in PRODUCT_TILES.items():
        product = bench.product(tile.fused_with_room, n, rounds, rank=16)
        config = choose_output_side(
            2048, 3072, 16, bias=False, capability=(9, 0), programs=bench.processors,
            co_resident=True,
        )  # fmt: skip
        config = replace(config, items=bench.processors)
        (walk, *_) = bench.walk(bench.sizes.walks[0] // 4 or 1, 16, config)
        own, other = bench.alone(product), bench.alone(walk)
        both, beside = bench.together(product, walk)
        found[f"{name}_co_resident"] = (both - own) / other
        shares.append(beside / other)
    found["co_resident"] = statistics.mean(shares)
    weight = bench.empty(*bench.sizes.small)
    operands = Operands(
        weight, scale_deviation=bench.empty(weight.shape[0], dtype=torch.float32),
        lora_a=bench.empty(16, weight.shape[1], dtype=torch.float32),
    )  # fmt: skip

    def one() -> None:
        launch_prepare(operands, OPTIONS, r_pad=16)

    def forked() -> None:
        stream = fork(bench.place) if bench.place.type == "cuda" else None
        one()
        if stream is not None:
            join(stream, bench.place)

    found["fork"] = bench.alone(forked) - bench.alone(one)
    x, t = (
        bench.empty(2048 if n > 64 else 16, weight.shape[1]),
        bench.empty(2048 if n > 64 else 16, 16),
    )
    needs = Needs(True, False, False, False, True, False, False)
    gradients = Gradients(lora_a=bench.empty(16, weight.shape[1], dtype=torch.float32))

    def ending(pdl: bool) -> None:
        inputs = launch_input_sums(
            x, x, t, operands, OPTIONS, needs, config=InputSideConfig(), triggers_next=pdl
        )
        launch_reduce(OutputSums(), inputs, gradients, operands, OPTIONS, pdl=pdl)

    pdl = bench.place.type == "cuda"
    found["deferred"] = bench.alone(lambda: ending(False)) - bench.alone(lambda: ending(pdl))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table: cost, value in use, value measured here."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.projector.fit_costs", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script out")
    options = parser.parse_args(arguments)
    cuda = options.device.startswith("cuda")
    if cuda and (not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9):
        print("benchmarks.projector.fit_costs: needs a Hopper GPU, found none", file=sys.stderr)
        return 2
    bench = Bench(options.device, Sizes() if cuda else TINY)
    found = product_costs(bench)
    found |= walk_costs(bench, found["launch"])
    found |= memory_costs(bench, found["launch"]) | stream_costs(bench)
    name = torch.cuda.get_device_name() if cuda else "CPU, whose times say nothing"
    print(f"{name} · torch {torch.__version__} · Triton {triton.__version__}")
    print(f"{'':16} {'in use':>16} {'measured':>16}")
    for cost in Costs._fields:
        print(f"{cost:16} {_text(getattr(COSTS, cost)):>16} {_text(found[cost]):>16}")
    return 0


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_text, value))
    return f"{value:.3g}"


if __name__ == "__main__":
    raise SystemExit(main())
