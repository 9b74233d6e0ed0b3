"""Tokens a second of one GPU and of several, and what dividing the frozen weights costs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import distributed, nn

from benchmarks.training.distributed_models import (
    CONFIG,
    LARGE,
    LR,
    TINY,
    NoSignals,
    random_model,
    trained_of,
)
from prodial_kernels import apply_prodial
from prodial_kernels.models.layers.blocks import blocks_of
from prodial_kernels.models.layers.recompute import prepare_blocks
from prodial_kernels.training.data.batches import Batch
from prodial_kernels.training.distributed.gathering import Collective, Copies, Gather
from prodial_kernels.training.distributed.gradients import GradientSum
from prodial_kernels.training.distributed.sharding import KEPT, DividedModel, shard_frozen
from prodial_kernels.training.distributed.world import World
from prodial_kernels.training.step.eager import EagerStep, TrainingStep
from prodial_kernels.training.step.graphed import Buckets, CudaGraphs, GraphedStep
from prodial_kernels.training.step.loss import make_loss

WARM_UPS, STEPS = 3, 8
# Of a model whose kernels are compiled already.
FEWER_WARM_UPS, FEWER_STEPS = 2, 5


def scaling(world: World, device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """Rows of the time of a step, of one GPU by itself and of all, each with the whole model."""
    models = {"tiny": TINY["mamba2"]} if tiny else LARGE
    for name, (prefix, options) in models.items():
        case = _Steps(device, prefix, options, tiny)
        for size in (1, world.size):
            # The others wait, so that one GPU has the host to itself.
            if size > 1 or world.main:
                row = case.timed(world if size > 1 else World(), WARM_UPS, STEPS)
                yield {"part": "scaling", "model": name, "processes": size, "way": "", **row}
            world.wait()
        del case


def sharded(world: World, device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """Rows of a model whose frozen weights are divided, in several ways, beside one GPU.

    The first is the way that ``--shard`` takes. A way that fails is a row with its error.
    """
    name = "tiny" if tiny else "nemotron-h-8b"
    prefix, options = TINY["mamba2"] if tiny else LARGE[name]
    case = _Steps(device, prefix, options, tiny)
    title = {"part": "sharded", "model": name}
    if world.main:
        row = case.timed(World(), WARM_UPS, FEWER_STEPS, profiled=True)
        yield {**title, "processes": 1, "way": "", **row}
    world.wait()
    for row in _in_ways(case, world, device):
        yield {**title, "processes": world.size, **row}
    del case
    # Hooks and what they belong to refer to each other.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    whole = _Steps(device, prefix, options, tiny)
    _by_rows(whole.model, device)
    found = _tried(world, lambda: whole.timed(world, FEWER_WARM_UPS, FEWER_STEPS))
    yield {**title, "processes": world.size, "way": "FSDP2", "default": False, **found}


def _in_ways(case: _Steps, world: World, device: torch.device) -> Iterator[dict[str, Any]]:
    divided = shard_frozen(case.model, device)
    own, n = divided.gather, len(divided.blocks)
    symmetric = sum(block.part for block in divided.blocks) if isinstance(own, Copies) else 0
    ways = [("--shard", own, KEPT), ("all kept for backward", own, n)]
    if symmetric:
        ways.append(("by NCCL", Collective(), KEPT))
    for way, gather, kept in ways:
        found = _tried(world, partial(_of, case, world, divided, gather, kept))
        if "peak_gb" in found:
            # PyTorch's allocator does not count what others read.
            found["peak_gb"] += symmetric / 1e9
        yield {"way": way, "default": way == "--shard", "gather": gather.said, **found}


def _of(
    case: _Steps, world: World, divided: DividedModel, gather: Gather, kept: int
) -> dict[str, Any]:
    divided.drop()
    divided.gather, divided.kept = gather, kept
    return case.timed(world, FEWER_WARM_UPS, FEWER_STEPS, profiled=kept == KEPT)


def _tried(world: World, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    error, found = None, {}
    try:
        found = measure()
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    errors = [one for one in world.gather(error) if one is not None]
    return {"error": errors[0]} if errors else found


def _by_rows(model: nn.Module, device: torch.device) -> None:
    """Divide the frozen weights with FSDP2: every tensor by its rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    trained = set(trained_of(model))
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, ignored_params=trained, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, ignored_params=trained)
    if device.type == "cuda":
        torch.cuda.empty_cache()


class _Steps:
    """A model with random weights and an adapter, and the time of its steps."""

    def __init__(
        self, device: torch.device, prefix: str, options: dict[str, Any], tiny: bool
    ) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.device, self._prefix = device, prefix
        self._vocabulary: int = options["vocab_size"]
        self._batch, self._length = (2, 16) if tiny else (4, 2048)
        self.model = random_model(prefix, options, device, dtype, None)
        apply_prodial(self.model, CONFIG)
        prepare_blocks(self.model, None, device=device)
        self.model.train()

    def timed(
        self, world: World, warm_ups: int, steps: int, *, profiled: bool = False
    ) -> dict[str, Any]:
        """Time steps of a world's processes; ``profiled``: see what ran beside what in one more."""
        cuda = self.device.type == "cuda"
        trained = trained_of(self.model)
        optimizer = torch.optim.AdamW(trained, lr=LR, fused=cuda)
        shared = GradientSum(trained, world, NoSignals()) if world.size > 1 else None
        loss = make_loss(self.model, "chunked")
        step: TrainingStep = EagerStep(loss, optimizer, clip=1.0, gradients=shared)
        graphed = cuda and self._prefix == "Mamba"
        if graphed:
            step = GraphedStep(
                loss, optimizer, Buckets(self._batch, self._length), CudaGraphs(self.device),
                clip=1.0, required=True, gradients=shared,
            )  # fmt: skip
        ids = torch.randint(
            0, self._vocabulary, (self._batch * world.size, self._length),
            generator=torch.Generator().manual_seed(3),
        )  # fmt: skip
        parts = [Batch(part, part) for part in ids.chunk(world.size)]

        def take() -> float:
            before = time.perf_counter()
            step.begin(parts, LR)
            result = step.finish()
            if cuda:
                torch.cuda.synchronize()
            if not result.finite:
                raise RuntimeError(f"a step gave {result}")
            return time.perf_counter() - before

        try:
            for _ in range(warm_ups):
                take()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            world.wait()
            times = sorted(take() for _ in range(steps))
            peak = torch.cuda.max_memory_allocated() if cuda else 0
            profile = _overlap(take) if profiled and cuda else {}
        finally:
            step.close()
        median = times[len(times) // 2]
        tokens = self._batch * self._length * world.size
        return {
            "ms": 1e3 * median, "ms_min": 1e3 * times[0], "ms_max": 1e3 * times[-1],
            "tokens_per_second": tokens / median, "peak_gb": peak / 1e9, "graphed": graphed,
            **profile,
        }  # fmt: skip


def _overlap(take: Callable[[], float]) -> dict[str, float]:
    """Of one step: how long NCCL and copies ran, how much of that beside others; the idle time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        take()
    spans: dict[str, list[tuple[float, float]]] = {"nccl": [], "copies": [], "computed": []}
    for event in profiler.events():
        if event.device_type.name == "CUDA" and not event.name.startswith("Memset"):
            copied = event.name.startswith("Memcpy")
            kind = "nccl" if "nccl" in event.name.lower() else "copies" if copied else "computed"
            spans[kind].append((event.time_range.start, event.time_range.end))
    everything = _union([span for found in spans.values() for span in found])
    idle = everything[-1][1] - everything[0][0] - _length(everything) if everything else 0.0
    return {**overlaps(spans), "idle_ms": idle / 1e3}


def overlaps(spans: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """Milliseconds of ``"nccl"`` and ``"copies"``, and of each beside ``"computed"``; from µs."""
    computed = _union(spans["computed"])
    found: dict[str, float] = {}
    for kind in ("nccl", "copies"):
        sent = _union(spans[kind])
        both = _length(sent) + _length(computed) - _length(_union([*sent, *computed]))
        found |= {f"{kind}_ms": _length(sent) / 1e3, f"{kind}_beside_others_ms": both / 1e3}
    return found


def _union(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    joined_up: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if joined_up and start <= joined_up[-1][1]:
            joined_up[-1] = (joined_up[-1][0], max(end, joined_up[-1][1]))
        else:
            joined_up.append((start, end))
    return joined_up


def _length(spans: Sequence[tuple[float, float]]) -> float:
    return sum(end - start for start, end in spans)
