"""Gradients of several processes together, beside those of one: in every way that there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.training.distributed_models import (
    CONFIG,
    SMALL,
    TINY,
    NoSignals,
    named_trained,
    random_model,
    trained_of,
)
from prodial_kernels import apply_prodial, capture
from prodial_kernels.linear import adapted_layers
from prodial_kernels.models.layers.blocks import blocks_of
from prodial_kernels.models.layers.fused_norms import fuse_norms
from prodial_kernels.training.data.batches import Batch
from prodial_kernels.training.distributed.gradients import GradientSum
from prodial_kernels.training.distributed.sharding import shard_frozen
from prodial_kernels.training.distributed.world import World
from prodial_kernels.training.step.eager import EagerStep
from prodial_kernels.training.step.graphed import Buckets, CudaGraphs, GraphedStep
from prodial_kernels.training.step.loss import make_loss

ULP = 2.0**-23
AGAIN, QUARTERS = "one GPU, the same again", "one GPU, four batches"
AT_ONCE = "one GPU, transformers' loss"
CASES = (
    ("mamba", torch.bfloat16, None), ("mamba", torch.float32, None),
    ("mamba", torch.bfloat16, "nf4"),
    ("mamba2", torch.bfloat16, None), ("mamba2", torch.float32, None),
    ("mamba2", torch.bfloat16, "nf4"),
    ("nemotron_h", torch.bfloat16, None), ("nemotron_h", torch.float32, None),
    ("nemotron_h", torch.bfloat16, "nf4"),
)  # fmt: skip
TINY_CASES = (("mamba2", torch.float32, None), ("mamba2", torch.float32, "nf4"))


def gradients(
    world: World, device: torch.device, tiny: bool, models: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Rows of how far every way's adapter gradients lie from those of one GPU.

    Of ``models``, all by default. A way that fails is a row with its error, and the rest goes on.
    """
    known = TINY if tiny else SMALL
    batch, length = (4, 16) if tiny else (8, 512)
    for name, dtype, quantize in TINY_CASES if tiny else CASES:
        if models and name not in models:
            continue
        title = {
            "part": "gradients", "model": name, "dtype": str(dtype)[6:],
            "base": quantize or "dense",
        }  # fmt: skip
        case = _Case(world, device, known[name], dtype, quantize, batch, length)
        for way, found in case.rows():
            yield {**title, "way": way, **found}


class _Case:
    """One model, whose gradients are computed in all ways from the same values."""

    def __init__(
        self, world: World, device: torch.device, model: tuple[str, dict[str, Any]],
        dtype: torch.dtype, quantize: str | None, batch: int, length: int,
    ) -> None:  # fmt: skip
        self.world, self.device = world, device
        self._what = (model, dtype, quantize)
        generator = torch.Generator().manual_seed(1)
        vocabulary = model[1]["vocab_size"]
        ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
        self.halves = [Batch(part, part) for part in ids.chunk(2)]
        self.quarters = [Batch(part, part) for part in ids.chunk(4)]
        self.all = [Batch(ids, ids)]
        self.model = self.build()
        self.grads: dict[str, Tensor] = {}
        self.reference: dict[str, Tensor] = {}
        self._ddp: Any = None

    def build(self) -> Any:
        (prefix, options), dtype, quantize = self._what
        model = random_model(prefix, options, self.device, dtype, quantize)
        apply_prodial(model, CONFIG)
        generator = torch.Generator(self.device).manual_seed(2)
        with torch.no_grad():
            for layer in adapted_layers(model).values():
                for _, parameter in layer.adapter_parameters():
                    drawn = torch.randn(parameter.shape, generator=generator, device=self.device)
                    parameter.add_(drawn, alpha=0.02)
        if self.device.type == "cuda":
            fuse_norms(model)
        return model.train()

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every way, with what it gave beside one GPU that accumulates the two halves."""
        self.step(self.halves)
        self.reference = self.taken()
        for title, way, beside in self.ways():
            found = self.tried(way)
            yield title, {**found, "beside": beside} if beside else found

    def tried(self, way: Callable[[], None]) -> dict[str, Any]:
        """What a way gave; its error where it failed, in any process."""
        error, found = None, {}
        for parameter in trained_of(self.model):
            parameter.grad = None
        try:
            way()
            found = self.compared()
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        errors = [one for one in self.world.gather(error) if one is not None]
        return {"error": errors[0]} if errors else found

    def ways(self) -> Iterator[tuple[str, Callable[[], None], str]]:
        """What to compare, by what it is called; of several GPUs, which row of one it is like."""
        cuda, dense = self.device.type == "cuda", self._what[2] is None
        whole = self.all[0].input_ids.to(self.device)
        yield AGAIN, lambda: self.step(self.halves), ""
        yield QUARTERS, lambda: self.step(self.quarters), ""
        yield "one GPU, the batch at once", lambda: self.step(self.all), ""
        yield AT_ONCE, lambda: self.mean(self.model, whole), ""
        yield "two GPUs", lambda: self.step(self.halves, world=self.world), AGAIN
        if cuda:
            yield "two GPUs, in a CUDA graph each", self.graphed, AGAIN
        quarters = partial(self.step, self.quarters, world=self.world)
        yield "two GPUs, two batches each", quarters, QUARTERS
        yield "two GPUs, DDP", self.ddp, AT_ONCE
        if cuda:
            yield "two GPUs, DDP, blocks captured", self.ddp_captured, AT_ONCE
        if dense:
            yield "two GPUs, FSDP2", self.fsdp, AT_ONCE
            yield "two GPUs, --shard", lambda: self.shard("auto"), AGAIN
            if cuda:
                yield "two GPUs, --shard by NCCL", lambda: self.shard("collective"), AGAIN
        if dense and self._what[1] != torch.float32:
            yield "one GPU, the same weights in fp32", self.in_fp32, ""

    def step(self, parts: Sequence[Batch], *, world: World | None = None) -> None:
        """Forward and backward of a step's batches, in this process or shared."""
        trained = trained_of(self.model)
        shared = None if world is None else GradientSum(trained, world, NoSignals())
        step = EagerStep(
            make_loss(self.model, "chunked"), torch.optim.SGD(trained, lr=0.0), gradients=shared
        )
        step.begin(parts, 0.0)
        self.grads = {n: p.grad for n, p in named_trained(self.model) if p.grad is not None}
        step.finish()

    def graphed(self) -> None:
        """The same by this package's captured step: warm-up, capture, replay."""
        trained = trained_of(self.model)
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)
        step = GraphedStep(
            make_loss(self.model, "chunked"), optimizer, Buckets(*self.halves[0].input_ids.shape),
            CudaGraphs(self.device), required=True,
            gradients=GradientSum(trained, self.world, NoSignals()),
        )  # fmt: skip
        try:
            for _ in range(4):
                step.begin(self.halves, 0.0)
                self.grads = {
                    n: p.grad.clone() for n, p in named_trained(self.model) if p.grad is not None
                }
                step.finish()
        finally:
            step.close()

    def ddp(self) -> None:
        self._ddp = nn.parallel.DistributedDataParallel(self.model)
        self.mean(self._ddp, self.own())

    def ddp_captured(self) -> None:
        own = self.own()
        with capture(self._ddp, batch_size=own.shape[0], seq_len=own.shape[1], norms=False):
            for _ in range(4):
                self.mean(self._ddp, own)

    def shard(self, gather: str) -> None:
        self.model, self._ddp = self.build(), None
        shard_frozen(self.model, self.device, gather=gather)
        self.step(self.halves, world=self.world)

    def fsdp(self) -> None:
        """All parameters divided: frozen ones as they are stored, the adapter as fp32 masters."""
        from torch.distributed.fsdp import fully_shard

        self.model, self._ddp = self.build(), None
        for block in blocks_of(self.model):
            fully_shard(block)
        fully_shard(self.model)
        self.mean(self.model, self.own())

    def in_fp32(self) -> None:
        """How far the roundings of 16 bits are from none: the scale of all of them."""
        self.model, self._ddp = self.build().float(), None
        self.step(self.halves)

    def own(self) -> Tensor:
        """The half of the batch that is this process's."""
        return self.halves[self.world.rank].input_ids.to(self.device)

    def mean(self, model: nn.Module, own: Tensor) -> None:
        """A loss and gradient as in a loop of one's own; DDP and FSDP2 average over processes."""
        for parameter in model.parameters():
            parameter.grad = None
        model(input_ids=own, labels=own, use_cache=False).loss.backward()
        self.grads = {
            name.removeprefix("module."): _whole(p.grad)
            for name, p in named_trained(model)
            if p.grad is not None
        }

    def taken(self) -> dict[str, Tensor]:
        return {name: grad.double().cpu() for name, grad in self.grads.items()}

    def compared(self) -> dict[str, Any]:
        """The farthest gradient, in units of 2^-23 of its norm, and how many are bit-equal."""
        found, right = self.taken(), self.reference
        if found.keys() != right.keys():
            raise RuntimeError(f"gradients of {len(found)} parameters, expected {len(right)}")
        far = {n: float((found[n] - right[n]).norm() / right[n].norm()) / ULP for n in right}
        worst = max(far, key=far.__getitem__)
        equal = sum(bool(torch.equal(found[n], right[n])) for n in right)
        ordered = sorted(far.values())
        return {
            "ulps": far[worst], "median_ulps": ordered[len(ordered) // 2], "worst": worst,
            "equal": equal, "parameters": len(right),
        }  # fmt: skip


def _whole(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()
