"""One projector, forward and backward, against the same layer frozen.

Times CUDA-graph replays, so the host's launch cost is left out; it is measured beside them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from prodial_kernels import prodial_linear
from prodial_kernels.testing import LinearCase

# (M tokens, K in_features, N out_features) of Mamba-130M and Mamba-1.4B projectors.
SHAPES = [
    (2048, 768, 3072), (2048, 1536, 768), (16384, 768, 3072), (16384, 1536, 768),
    (8192, 2048, 8192), (8192, 4096, 2048), (16384, 2048, 8192), (16384, 4096, 2048),
]  # fmt: skip
# (block size wanted, rank); a size that does not divide K gives way to the next power of two.
VARIANTS = [(1, 16), (12, 16), (48, 16), (1, 64)]


def make_case(m: int, k: int, n: int, block_size: int, r: int) -> LinearCase:
    """Draw a projector a little way into its training, on the GPU in bf16 with fp32 masters."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator) * std

    return LinearCase(
        x=normal(m, k).bfloat16().requires_grad_(),
        weight=normal(n, k, std=k**-0.5).bfloat16(),
        blocks=normal(k // block_size, block_size, block_size, std=0.05).requires_grad_(),
        scale=(1 + normal(n, std=0.05)).requires_grad_(),
        lora_a=normal(r, k, std=k**-0.5).requires_grad_(),
        lora_b=normal(n, r, std=0.02).requires_grad_(),
        bias=None,
        grad_output=normal(m, n).bfloat16(),
    )


def adapted_step(case: LinearCase) -> None:
    """Forward and backward with every gradient of the adapter and of x."""
    y = prodial_linear(
        case.x, case.weight, blocks=case.blocks, scale=case.scale, lora_a=case.lora_a,
        lora_b=case.lora_b, lora_scaling=case.lora_scaling, impl="triton",
    )  # fmt: skip
    leaves = (case.x, case.blocks, case.scale, case.lora_a, case.lora_b)
    torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], case.grad_output)


def frozen_step(case: LinearCase) -> None:
    """Forward and the input's gradient of the plain frozen layer."""
    torch.autograd.grad(case.x @ case.weight.T, case.x, case.grad_output)


def graph_time(step: Callable[[], None], repeats: int = 10, rounds: int = 7) -> float:
    """Return the median time of one step in µs over replays of a graph of ``repeats`` steps."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            step()
    graph.replay()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / repeats)
    return statistics.median(times)


def host_time(step: Callable[[], None], repeats: int = 50) -> float:
    """Return the host's time for launching one step in µs."""
    step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / repeats * 1e6


def peak_memory(step: Callable[[], None]) -> float:
    """Return the allocator's peak over one step, above what was allocated before, in MiB."""
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(m: int, k: int, n: int) -> dict[str, float]:
    """Return every figure of one shape: µs, ratios to the frozen layer, MiB."""
    row: dict[str, float] = {}
    for wanted, r in VARIANTS:
        block_size = wanted if k % wanted == 0 else 1 << wanted.bit_length()
        case = make_case(m, k, n, block_size, r)
        if not row:
            row["frozen_us"] = graph_time(lambda case=case: frozen_step(case))
            row["frozen_mib"] = peak_memory(lambda case=case: frozen_step(case))
            row["mib"] = peak_memory(lambda case=case: adapted_step(case))
            row["host_us"] = host_time(lambda case=case: adapted_step(case))
            row["frozen_host_us"] = host_time(lambda case=case: frozen_step(case))
        took = graph_time(lambda case=case: adapted_step(case))
        row[f"P{block_size}_r{r}_us"] = took
        row[f"P{block_size}_r{r}_ratio"] = took / row["frozen_us"]
    return row


def main(arguments: list[str] | None = None) -> int:
    """Print a table and write it as JSON to ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.projector: needs a CUDA device, found none", file=sys.stderr)
        return 1
    import triton

    rows = {}
    for shape in SHAPES:
        rows[",".join(map(str, shape))] = row = measure(*shape)
        ratios = "  ".join(f"{k[:-6]} {v:.2f}" for k, v in row.items() if k.endswith("ratio"))
        print(
            f"{shape}: frozen {row['frozen_us']:.1f} us  {ratios}  memory "
            f"{row['mib'] / row['frozen_mib']:.2f}  host {row['host_us']:.0f} us",
            flush=True,
        )
    record = {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "command": "python -m benchmarks.projector",
        "rows": rows,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
