"""What the hardware allows: operations and bytes of a case over two measured ceilings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from benchmarks.harness.timing import Replay
from benchmarks.projector.cases import Case
from benchmarks.projector.rows import ProjectorRow

# Which parts of the adapter each method has, for counting its operations.
PARTS: Mapping[str, tuple[str, ...]] = {
    "frozen": (), "ProDiaL": ("blocks", "scale", "lora"),
    "ProDiaL in fp8": ("blocks", "scale", "lora", "fp8"), "LoRA": ("lora",),
    "DoRA": ("scale", "lora"), "OFT": ("blocks",),
}  # fmt: skip


@dataclass
class Ceilings:
    """The best the device did here: FLOP/s in a product, bytes/s (read + written) in a copy.

    Copied by a kernel: the memcpy that ``copy_`` becomes in a graph takes 1.5 times as long (H200).
    """

    flops: float = 0.0
    bandwidth: float = 0.0
    status: str = "ok"


@dataclass(frozen=True)
class CeilingsTask:
    """Measures the ceilings: the first task of a run."""

    dtype: str
    seconds: float = 1.0
    bytes: int = 5 << 30

    def __str__(self) -> str:
        return f"ceilings {self.dtype}"

    def prepare(self, device: str, alone: AbstractContextManager[object]) -> PreparedCeilings:
        """Nothing: it is all measuring."""
        return PreparedCeilings(device, getattr(torch, self.dtype))

    def rows(self, status: str) -> list[Ceilings]:
        """No ceilings, with the reason."""
        return [Ceilings(status=status)]


@dataclass
class PreparedCeilings:
    """A device."""

    device: str
    dtype: torch.dtype

    def measure(self) -> list[Ceilings]:
        """The device's ceilings; of a CPU from small operands."""
        return [measure_ceilings(self.device, self.dtype, tiny=self.device == "cpu")]


@dataclass(frozen=True)
class Work:
    """The operations one forward and backward cannot do without, and the bytes it must move."""

    flops: float
    bytes: float

    def floor_us(self, ceilings: Ceilings) -> float:
        """No implementation is faster, up to the quality of the ceilings."""
        return max(self.flops / ceilings.flops, self.bytes / ceilings.bandwidth) * 1e6


def work(case: Case, method: str) -> Work:
    """Count a method on a case: each operand once in forward and once in backward.

    The matrices are X, W, Y in forward, dY, W, dX in backward, X again where an adapter's
    gradient needs it and Y where the scale's does; adapters are small and left out.
    """
    m, k, n, p, r = case.m, case.k, case.n, case.p, case.r
    parts = PARTS[method]
    # fp8's products count half: the ceiling is that of 16 bits.
    flops = (2.0 if "fp8" in parts else 4.0) * m * n * k
    moved = 2 * (m * k + n * k + m * n)
    if parts:
        moved += m * k
    if "scale" in parts:
        flops += 3.0 * m * n
        moved += m * n
    if "lora" in parts:
        flops += 6.0 * m * r * (n + k)
    if "blocks" in parts:
        flops += 6.0 * m * k * p
    return Work(flops, float(moved * case.torch_dtype.itemsize))


def add_roofline(row: ProjectorRow, ceilings: Ceilings) -> None:
    """Add what the roofline allows to a measured row."""
    if row.both_us is not None:
        row.roofline_us = work(row.case, row.method).floor_us(ceilings)
        row.roofline_fraction = row.roofline_us / row.both_us


def measure_ceilings(device: str, dtype: torch.dtype, *, tiny: bool = False) -> Ceilings:
    """Time a square product and a copy on random data."""
    side, length = (256, 2**20) if tiny else (8192, 2**29)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.randn(length, device=device)
    target = torch.empty_like(source)
    product = Replay([lambda: _discard(torch.mm(a, b, out=out))], device)
    copy = Replay([copier(source, target)], device)
    product_us, copy_us = (
        statistics.median(replay.sample() for _ in range(5)) for replay in (product, copy)
    )
    return Ceilings(2.0 * side**3 / product_us * 1e6, 2.0 * 4 * length / copy_us * 1e6)


def copier(source: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
    """Return what copies ``source`` [n] to ``target`` [n]: on a GPU a Triton kernel."""
    if not source.is_cuda:
        return lambda: _discard(target.copy_(source))
    # Here, so that a run on a CPU needs no Triton.
    from benchmarks.projector.copy_kernel import launch_copy

    return lambda: launch_copy(source, target)


def _discard(result: torch.Tensor) -> None:
    del result
