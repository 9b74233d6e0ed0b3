"""What one projector costs the host: µs of Python, autograd and launches, ours beside the frozen.

``python -m benchmarks.host_time`` measures in eager, from an idle device each time, so that no
launch waits for the one before it. ``--profile`` adds where the time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.harness.timing import synchronise
from prodial_kernels import ProdialLinear, prodial_linear

# M, K, N: the host's part hardly depends on the shape, only on which launches a shape takes.
SHAPES = ((2048, 768, 3072), (2048, 1536, 768), (16384, 768, 3072))


@dataclass(frozen=True)
class HostTime:
    """Medians in µs of one call each: forward, backward, and the two together."""

    forward: float
    backward: float
    both: float


@dataclass(frozen=True)
class Layer:
    """A layer as a training step calls it: forward, backward towards x and all that trains."""

    forward: Callable[[], Tensor]
    dy: Tensor
    leaves: Sequence[Tensor]

    def clear(self) -> None:
        """Drop the gradients, as ``zero_grad`` does."""
        for leaf in self.leaves:
            leaf.grad = None

    def step(self) -> None:
        """One forward and backward."""
        self.forward().backward(self.dy)


def layers(m: int, k: int, n: int, p: int, device: str, impl: str) -> dict[str, Layer]:
    """Return the layers to compare on x [m, k], r = 16, bias-free."""
    dtype = torch.bfloat16
    frozen = nn.Linear(k, n, bias=False, device=device, dtype=dtype).requires_grad_(False)
    adapted = ProdialLinear.from_linear(frozen, r=16, block_size=p, impl=impl)
    x = torch.randn(m, k, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(m, n, device=device, dtype=dtype)
    adapter = [parameter for _, parameter in adapted.adapter_parameters()]
    blocks, deviation, a, b = adapter
    scale = (1 + deviation.detach()).requires_grad_()

    def function() -> Tensor:
        return prodial_linear(
            x, frozen.weight, blocks=blocks, scale=scale, lora_a=a, lora_b=b, lora_scaling=1.0,
            training=True, impl=impl,
        )  # fmt: skip

    return {
        "frozen nn.Linear": Layer(lambda: frozen(x), dy, [x]),
        "prodial_linear": Layer(function, dy, [x, blocks, scale, a, b]),
        "ProdialLinear": Layer(lambda: adapted(x), dy, [x, *adapter]),
    }


def host_time(layer: Layer, calls: int) -> HostTime:
    """Measure ``calls`` steps of a layer, each from an idle device and without gradients."""
    cuda = layer.dy.is_cuda
    samples = []
    for call in range(calls + 10):
        layer.clear()
        synchronise(cuda)
        start = time.perf_counter()
        y = layer.forward()
        middle = time.perf_counter()
        y.backward(layer.dy)
        end = time.perf_counter()
        if call >= 10:
            samples.append((middle - start, end - middle, end - start))
    return HostTime(*(statistics.median(column) * 1e6 for column in zip(*samples, strict=True)))


def profile(layer: Layer, calls: int, rows: int) -> None:
    """Print the functions that take most of the time of ``calls`` steps."""
    profiler = cProfile.Profile()
    # Otherwise backward runs in autograd's own thread, which the profiler may not see.
    with torch.autograd.set_multithreading_enabled(False):
        profiler.enable()
        for _ in range(calls):
            layer.clear()
            layer.step()
        profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table: host µs per forward, backward and both, for each shape and layer."""
    parser = argparse.ArgumentParser("python -m benchmarks.host_time", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script out")
    parser.add_argument("--impl", default="triton", help="what ProDiaL runs on")
    parser.add_argument("--block-size", type=int, default=1, help="P")
    parser.add_argument("--calls", type=int, default=200, help="samples of each figure")
    parser.add_argument("--profile", action="store_true", help="the 20 functions that take most")
    options = parser.parse_args(arguments)
    cuda = options.device.startswith("cuda")
    shapes = SHAPES if cuda else ((32, 48, 96),)

    name = torch.cuda.get_device_name() if cuda else "CPU, which says nothing about a GPU's host"
    print(f"host µs for one call, median of {options.calls} · {name} · torch {torch.__version__}")
    print(f"{'M, K, N':>18} {'layer':<17} {'forward':>8} {'backward':>9} {'both':>7}")
    for m, k, n in shapes:
        compared = layers(m, k, n, options.block_size, options.device, options.impl)
        for title, layer in compared.items():
            took = host_time(layer, options.calls)
            print(
                f"{f'{m}, {k}, {n}':>18} {title:<17} {took.forward:8.1f} {took.backward:9.1f} "
                f"{took.both:7.1f}"
            )
        if options.profile:
            profile(compared["prodial_linear"], options.calls, rows=20)
    if cuda:
        from prodial_kernels.kernels.replay.recorded_calls import obstacles

        print("\n".join(f"launched by Triton's JIT each time: {reason}" for reason in obstacles()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
