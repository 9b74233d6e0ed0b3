"""Measure what the plans' costs stand for, and print each beside the value in ``choices/costs.py``.

``python -m benchmarks.projector.fit_costs`` takes about three minutes on one Hopper GPU;
``--device cpu`` tries the script out on sizes that say nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from benchmarks.harness.timing import Replay
from prodial_kernels.kernels.choices import tile_sizes
from prodial_kernels.kernels.choices.backward_plan import PRODUCT_TILES
from prodial_kernels.kernels.choices.costs import COSTS, Costs
from prodial_kernels.kernels.choices.tile_sizes import GemmConfig, OutputSideConfig
from prodial_kernels.kernels.projector import gemm, output_side, passes, prepare, reduce
from prodial_kernels.kernels.projector.input_side import InputSums, launch_input_sums
from prodial_kernels.kernels.projector.operands import (
    Gradients,
    Needs,
    Operands,
    ProjectionOptions,
)
from prodial_kernels.kernels.projector.output_side import OutputSums
from prodial_kernels.kernels.replay.recorder import fork, join

OPTIONS = ProjectionOptions("triton", lora_scaling=1.0)
DS_AND_DB = Needs(False, False, False, True, False, True, False)
DX_AND_DA = Needs(True, False, False, False, True, False, False)
Step = Callable[..., Any]


class Sizes(NamedTuple):
    """Two lengths of a product's sum, two numbers of rounds, two walks, and the like."""

    sums: tuple[int, int] = (1024, 4096)
    rounds: tuple[int, int] = (1, 4)
    walks: tuple[int, int] = (16, 64)
    tile_columns: int = 4
    tokens: int = 2048
    weight: int = 8192
    small: tuple[int, int] = (768, 1536)
    side: int = 22


TINY = Sizes((32, 64), (1, 2), (1, 2), 1, 16, 64, (16, 32), 2)


class Bench:
    """Times of the kernels on one device, in µs."""

    def __init__(self, device: str, sizes: Sizes) -> None:
        self.cuda, self.sizes = device.startswith("cuda"), sizes
        self.place = torch.empty(0, device=device).device
        self.processors = passes.device_limits(self.place).processors

    def random(self, *shape: int) -> Tensor:
        """16-bit operands."""
        return self.master(*shape).to(torch.bfloat16 if self.cuda else torch.float16)

    def master(self, *shape: int) -> Tensor:
        """fp32 operands."""
        return torch.randn(*shape, device=self.place)

    def alone(self, *steps: Step) -> float:
        """µs of a step; several take turns, so that none finds its operands in a cache."""
        for step in steps:
            step()
        replay = Replay(steps, self.place.type)
        return statistics.median(replay.sample() for _ in range(7))

    def together(self, main: Step, side: Step) -> tuple[float, float]:
        """µs of two steps that begin at the same time, the second on a side stream."""
        if not self.cuda:
            return self.alone(main), self.alone(side)
        samples = []
        for _ in range(12):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
            torch.cuda.synchronize()
            torch.cuda._sleep(4_000_000)  # meanwhile the host queues everything
            stream = fork(self.place)
            marks[0].record()
            main()
            marks[1].record()
            marks[2].record(stream.stream)
            side(side=stream)
            marks[3].record(stream.stream)
            join(stream, self.place)
            torch.cuda.synchronize()
            samples.append((marks[0].elapsed_time(marks[1]), marks[2].elapsed_time(marks[3])))
        first, second = (statistics.median(times) for times in zip(*samples[2:], strict=True))
        return first * 1e3, second * 1e3

    def product(
        self, config: GemmConfig, n: int, rounds: int, *, rank: int = 0, forward: bool = False
    ) -> Step:
        """A product that sums along n, in so many rounds of tiles; ``config.programs`` or all."""
        config = replace(config, programs=config.programs or self.processors)
        m = config.block_m * -(-rounds * config.programs // self.sizes.tile_columns)
        k = config.block_n * self.sizes.tile_columns
        right = self.random(k, n) if forward else self.random(n, k)
        return partial(
            gemm.launch_gemm, self.random(m, n), right, self.random(m, k), v_transposed=forward,
            config=config, inner=self.random(rank, n) if rank else None,
        )  # fmt: skip

    def line(self, config: GemmConfig) -> tuple[float, float]:
        """(µs for 1,000 of the sum, of a launch) of a flattened product, by least squares."""
        points = [
            (rounds * n / 1e3, self.alone(self.product(config, n, rounds)))
            for n in self.sizes.sums for rounds in self.sizes.rounds
        ]  # fmt: skip
        return statistics.linear_regression(*zip(*points, strict=True))

    def walk(self, tiles: int, r_pad: int, config: OutputSideConfig) -> list[Step]:
        """The output side, one item a program, each of so many tiles of tokens."""
        m, n = tiles * config.block_m * config.items, config.block_n
        return [
            partial(
                output_side.launch_output_side, self.random(m, n), y, self.random(m, r_pad),
                Operands(y, scale_deviation=self.master(n), lora_b=self.master(n, r_pad)),
                OPTIONS, DS_AND_DB, config=config,
            )
            for y in (self.random(m, n) for _ in range(3))
        ]  # fmt: skip

    def scaling(self, n: int, k: int) -> Step:
        """What comes before backward's product: s ⊙ W."""
        operands = Operands(self.random(n, k), scale_deviation=self.master(n))
        return partial(prepare.launch_prepare, operands, OPTIONS, r_pad=16)


def product_costs(bench: Bench) -> dict[str, Any]:
    """Steps, launches, ends of tiles and fused low-rank products."""
    found: dict[str, Any] = {}
    n, rounds = bench.sizes.sums[1], bench.sizes.rounds[1]
    launches = []
    for name, tile in PRODUCT_TILES.items():
        found[f"{name}_step"], launch = bench.line(tile.plain)
        launches.append(launch)
        one = rounds * found[f"{name}_step"] * n / 1e3
        narrow, wide = (
            (bench.alone(bench.product(tile.fused, n, rounds, rank=rank)) - launch) / one - 1
            for rank in (16, 64)
        )
        found[f"{name}_low_rank"] = (narrow - (wide - narrow) / 3, (wide - narrow) / 3)
    found["launch"] = launch = statistics.mean(launches)
    wide_round, tall_round = (
        bench.alone(bench.product(replace(config, flatten=True), n, rounds, forward=True)) - launch
        for config in (tile_sizes.WIDE, tile_sizes.TALL)
    )
    flat, ended = (
        bench.alone(bench.product(replace(tile_sizes.TALL, flatten=flatten), n, rounds))
        for flatten in (True, False)
    )
    return found | {"tall_round": tall_round / wide_round, "tile_end": (ended - flat) / rounds}


def walk_costs(bench: Bench, launch: float) -> dict[str, Any]:
    """The sums over the tokens: tiles, beginnings and ends, rank 64, one more split."""
    short, long = bench.sizes.walks
    config = OutputSideConfig(64, 128, 8, 3, bench.sizes.side, bench.sizes.side, True)
    took = {
        (tiles, r_pad): bench.alone(*bench.walk(tiles, r_pad, config))
        for tiles in (short, long) for r_pad in (16, 64)
    }  # fmt: skip
    tile, wide = ((took[long, r_pad] - took[short, r_pad]) / (long - short) for r_pad in (16, 64))
    n, k = bench.sizes.small
    b = bench.master(n, 16)
    operands = Operands(bench.random(n, k), lora_a=bench.master(16, k), lora_b=b)
    few, many = (
        bench.alone(
            partial(
                reduce.launch_reduce, OutputSums(b=bench.master(splits, n, 16)), InputSums(),
                Gradients(lora_b=b), operands, OPTIONS,
            )
        )
        for splits in (8, 32)
    )  # fmt: skip
    return {
        "walk_tile": tile, "walk_rank": wide / tile - 1,
        "walk_ends": (took[short, 16] - launch) / tile - short,
        "walk_split": (many - few) / 24 / tile,
    }  # fmt: skip


def memory_costs(bench: Bench, launch: float) -> dict[str, Any]:
    """The launch before a product, and separate low-rank passes, alone and beside a product."""
    size, n, left = bench.sizes.weight, bench.sizes.sums[1], bench.sizes.side
    memory = 4 * size * size / bench.alone(bench.scaling(size, size))
    rows, columns = bench.sizes.small

    def low_rank(m: int) -> Step:
        b = bench.master(n, 16)
        return partial(prepare.launch_low_rank, bench.random(m, n), b, OPTIONS, 16)

    config = replace(PRODUCT_TILES["wide"].fused, programs=bench.processors - left)
    product = bench.product(config, 2 * n, 4 * bench.sizes.rounds[1], rank=16)
    _, beside = bench.together(product, low_rank(64 * left))
    return {
        "memory": memory,
        "prepare": bench.alone(bench.scaling(rows, columns)) - 4 * rows * columns / memory,
        "low_rank_all": 2 * size * n / (bench.alone(low_rank(size)) - launch),
        "low_rank_one": 2 * 64 * n / (beside - launch),
    }


def stream_costs(bench: Bench) -> dict[str, Any]:
    """A product co-resident with the output side, a second stream, and reduce without PDL."""
    found: dict[str, Any] = {}
    config = tile_sizes.choose_output_side(
        2048, 3072, 16, bias=False, capability=(9, 0), programs=bench.processors, co_resident=True
    )
    walk, *_ = bench.walk(
        max(1, bench.sizes.walks[0] // 4), 16, replace(config, items=config.programs)
    )
    alone, shares = bench.alone(walk), []
    for name, tile in PRODUCT_TILES.items():
        if tile.fused_with_room is None:
            continue
        product = bench.product(tile.fused_with_room, bench.sizes.sums[0], 4, rank=16)
        longer, beside = bench.together(product, walk)
        found[f"{name}_co_resident"] = (longer - bench.alone(product)) / alone
        shares.append(beside / alone)
    found["co_resident"] = statistics.mean(shares)
    scaling = bench.scaling(*bench.sizes.small)

    def forked() -> None:
        stream = fork(bench.place) if bench.cuda else None
        scaling()
        if stream is not None:
            join(stream, bench.place)

    found["fork"] = bench.alone(forked) - bench.alone(scaling)
    m, k = bench.sizes.tokens, bench.sizes.small[1]
    x, t, a = bench.random(m, k), bench.random(m, 16), bench.master(16, k)
    operands = Operands(bench.random(16, k), lora_a=a)

    def ending(pdl: bool) -> None:
        inputs = launch_input_sums(
            x, x, t, operands, OPTIONS, DX_AND_DA, config=tile_sizes.InputSideConfig(),
            triggers_next=pdl,
        )  # fmt: skip
        reduce.launch_reduce(OutputSums(), inputs, Gradients(lora_a=a), operands, OPTIONS, pdl=pdl)

    found["deferred"] = bench.alone(partial(ending, False)) - bench.alone(
        partial(ending, bench.cuda)
    )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table: cost, value in use, value measured here."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.projector.fit_costs", description=__doc__
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script out")
    cuda = (device := parser.parse_args(arguments).device).startswith("cuda")
    if cuda and not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9):
        print("benchmarks.projector.fit_costs: needs a Hopper GPU, found none", file=sys.stderr)
        return 2
    bench = Bench(device, Sizes() if cuda else TINY)
    found = product_costs(bench)
    launch = found["launch"]
    found |= walk_costs(bench, launch) | memory_costs(bench, launch) | stream_costs(bench)
    name = torch.cuda.get_device_name() if cuda else "CPU, whose times say nothing"
    print(f"{name} · torch {torch.__version__} · Triton {triton.__version__}")
    print(f"{'':16} {'in use':>16} {'measured':>16}")
    for cost in Costs._fields:
        print(f"{cost:16} {_text(getattr(COSTS, cost)):>16} {_text(found[cost]):>16}")
    return 0


def _text(value: Any) -> str:
    return ", ".join(map(_text, value)) if isinstance(value, tuple) else f"{value:.3g}"


if __name__ == "__main__":
    raise SystemExit(main())
