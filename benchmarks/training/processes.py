"""What processes of one run measure together: gradients beside one GPU's, and tokens a second.

``python -m benchmarks.training.processes PART FILE`` is one of them, started by
``benchmarks.distributed``; the first writes rows to FILE, one JSON object a line, as they come.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.harness.startup import prepare_process

prepare_process()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.training.random_weights import random_quantized  # noqa: E402
from prodial_kernels import ProdialConfig, apply_prodial, capture  # noqa: E402
from prodial_kernels.linear import adapted_layers  # noqa: E402
from prodial_kernels.models.layers.blocks import blocks_of  # noqa: E402
from prodial_kernels.models.layers.fused_norms import fuse_norms  # noqa: E402
from prodial_kernels.models.layers.recompute import prepare_blocks  # noqa: E402
from prodial_kernels.training.data.batches import Batch  # noqa: E402
from prodial_kernels.training.distributed.gradients import GradientSum  # noqa: E402
from prodial_kernels.training.distributed.launch import Launch  # noqa: E402
from prodial_kernels.training.distributed.sharding import shard_frozen  # noqa: E402
from prodial_kernels.training.distributed.world import World, joined  # noqa: E402
from prodial_kernels.training.step.eager import EagerStep, TrainingStep  # noqa: E402
from prodial_kernels.training.step.graphed import Buckets, CudaGraphs, GraphedStep  # noqa: E402
from prodial_kernels.training.step.loss import make_loss  # noqa: E402

ULP = 2.0**-23
LR = 1e-5
CONFIG = ProdialConfig(r=16)
_SSD = {"hidden_size": 768, "chunk_size": 256, "n_groups": 1, "vocab_size": 4096}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", {"hidden_size": 768, "num_hidden_layers": 4, "vocab_size": 4096}),
    "mamba2": (
        "Mamba2",
        {**_SSD, "num_hidden_layers": 4, "num_heads": 24, "head_dim": 64, "state_size": 128},
    ),
    "nemotron_h": (
        "NemotronH",
        {
            **_SSD, "num_hidden_layers": 4, "num_attention_heads": 12, "num_key_value_heads": 4,
            "head_dim": 64, "mamba_num_heads": 24, "mamba_head_dim": 64, "ssm_state_size": 128,
            "intermediate_size": 2048, "layers_block_type": ["mamba", "mlp", "mamba", "attention"],
        },
    ),
}  # fmt: skip
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": (
        "Mamba2",
        {
            "hidden_size": 32, "chunk_size": 8, "n_groups": 1, "vocab_size": 64, "num_heads": 8,
            "head_dim": 8, "state_size": 8, "num_hidden_layers": 2,
        },
    ),
}  # fmt: skip
# nvidia/Nemotron-H-8B-Base-8K: 24 Mamba-2, 24 MLP and 4 attention layers.
_PATTERN = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
_KINDS = {"M": "mamba", "-": "mlp", "*": "attention"}
LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba-1.4b": ("Mamba", {"hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 50280}),
    "nemotron-h-8b": (
        "NemotronH",
        {
            "hidden_size": 4096, "vocab_size": 131072, "intermediate_size": 21504,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "mamba_num_heads": 128, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8,
            "chunk_size": 128, "num_hidden_layers": len(_PATTERN),
            "layers_block_type": [_KINDS[kind] for kind in _PATTERN],
        },
    ),
}  # fmt: skip


class NoSignals:
    """Of a measurement nobody asks to stop."""

    noted: int | None = None

    def agree(self) -> None:
        """Nothing to agree on."""


def main(part: str, file: str, *options: str) -> None:
    """Measure a part and write its rows."""
    tiny = "--tiny" in options
    device = torch.device("cpu" if tiny else "cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    with joined(Launch.from_environment(), device) as world:
        device = torch.device("cuda", torch.cuda.current_device()) if not tiny else device
        measured = (
            gradients(world, device, tiny) if part == "gradients" else scaling(world, device, tiny)
        )
        with open(file, "a", encoding="utf-8") as stream:
            for row in measured:
                if world.main:
                    stream.write(json.dumps(row) + "\n")
                    stream.flush()
                    print(row, flush=True)


# Gradients


def gradients(world: World, device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """Rows of how far every way's adapter gradients lie from those of one GPU."""
    models = TINY if tiny else SMALL
    batch, length = (4, 16) if tiny else (8, 512)
    dtypes = (torch.float32,) if tiny else (torch.bfloat16, torch.float32)
    for dtype in dtypes:
        for name, quantize in [(name, None) for name in models] + [("mamba2", "nf4")]:
            if quantize and dtype == torch.float32 and not tiny:
                continue
            case = _Case(world, device, models[name], dtype, quantize, batch, length)
            title = {"model": name, "dtype": str(dtype)[6:], "base": quantize or "dense"}
            for way, found in case.ways():
                yield {"part": "gradients", **title, "way": way, **found}


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
        self.alone = World()
        self.reference: dict[str, Tensor] = {}

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

    def ways(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every way, with what it gave beside one GPU that accumulates the two halves."""
        for parameter in self.model.parameters():
            parameter.grad = None
        self.step(self.halves)
        self.reference = self.taken()
        self.step(self.halves)
        yield "one GPU, the same again", self.compared()
        self.step(self.all)
        yield "one GPU, the batch at once", self.compared()
        self.step(self.quarters)
        yield "one GPU, four batches", self.compared()
        self.step(self.halves, world=self.world)
        yield "two GPUs", self.compared()
        self.step(self.quarters, world=self.world)
        yield "two GPUs, two batches each", self.compared()
        if self.device.type == "cuda":
            self.captured()
            yield "two GPUs, in a CUDA graph each", self.compared()
        yield from self.users_loops()

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

    def captured(self) -> None:
        """The same by this package's captured step: warm-up, capture, replay."""
        trained = trained_of(self.model)
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)
        step = GraphedStep(
            make_loss(self.model, "chunked"), optimizer, Buckets(*self.halves[0].input_ids.shape),
            CudaGraphs(self.device), required=True,
            gradients=GradientSum(trained, self.world, NoSignals()),
        )  # fmt: skip
        for _ in range(4):
            step.begin(self.halves, 0.0)
            self.grads = {
                n: p.grad.clone() for n, p in named_trained(self.model) if p.grad is not None
            }
            step.finish()
        step.close()

    def users_loops(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """DDP, and FSDP2 with adapters whole and divided: model, loss and mean as users have it."""
        self.mean(self.model, self.all[0].input_ids.to(self.device))
        yield "one GPU, transformers' loss", self.compared()
        own = self.halves[self.world.rank].input_ids.to(self.device)
        model: Any = nn.parallel.DistributedDataParallel(self.model)
        self.mean(model, own)
        yield "two GPUs, DDP", self.compared()
        if self.device.type == "cuda":
            captured = capture(
                model, batch_size=own.shape[0], seq_len=own.shape[1], norms=False
            )  # fmt: skip
            for _ in range(4):
                self.mean(model, own)
            yield "two GPUs, DDP, blocks captured", self.compared()
            captured.release()
        del model
        if self._what[2] is not None:
            return
        self.model = self.build()
        shard_frozen(self.model, self.device)
        self.step(self.halves, world=self.world)
        yield "two GPUs, --shard", self.compared()
        from torch.distributed.fsdp import fully_shard

        self.model = self.build()
        for block in blocks_of(self.model):
            fully_shard(block)
        fully_shard(self.model)
        self.mean(self.model, own)
        yield "two GPUs, FSDP2 with the adapter", self.compared()

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


# Scaling


def scaling(world: World, device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """Rows of the time of a step, of one GPU by itself and of all."""
    models = {"tiny": TINY["mamba2"]} if tiny else LARGE
    batch, length, steps = (2, 16, 2) if tiny else (4, 2048, 8)
    for name, (prefix, options) in models.items():
        shards = (False, True) if name in ("nemotron-h-8b", "tiny") else (False,)
        for shard in shards:
            for size in (1, world.size):
                if shard and size == 1:
                    continue
                # The others wait, so that one GPU has the host to itself.
                if size > 1 or world.main:
                    row = _timed(
                        world if size > 1 else World(),
                        device,
                        prefix,
                        options,
                        batch,
                        length,
                        steps,
                        shard,
                    )
                    yield {
                        "part": "scaling", "model": name, "processes": size, "shard": shard, **row
                    }  # fmt: skip
                world.wait()


def _timed(
    world: World, device: torch.device, prefix: str, options: dict[str, Any], batch: int,
    length: int, steps: int, shard: bool,
) -> dict[str, Any]:  # fmt: skip
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(prefix, options, device, dtype, None)
    apply_prodial(model, CONFIG)
    if shard:
        shard_frozen(model, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    prepare_blocks(model, None, device=device)
    model.train()
    trained = trained_of(model)
    optimizer = torch.optim.AdamW(trained, lr=LR, fused=device.type == "cuda")
    shared = GradientSum(trained, world, NoSignals()) if world.size > 1 else None
    loss = make_loss(model, "chunked")
    step: TrainingStep = EagerStep(loss, optimizer, clip=1.0, gradients=shared)
    graphed = device.type == "cuda" and not shard and prefix == "Mamba"
    if graphed:
        step = GraphedStep(
            loss, optimizer, Buckets(batch, length), CudaGraphs(device), clip=1.0, required=True,
            gradients=shared,
        )  # fmt: skip
    ids = torch.randint(
        0, options["vocab_size"], (batch * world.size, length),
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    parts = [Batch(part, part) for part in ids.chunk(world.size)]

    def take() -> float:
        before = time.perf_counter()
        step.begin(parts, LR)
        result = step.finish()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if not result.finite:
            raise RuntimeError(f"a step gave {result}")
        return time.perf_counter() - before

    for _ in range(4):
        take()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    world.wait()
    times = sorted(take() for _ in range(steps))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    profile = _overlap(take) if shard and device.type == "cuda" else {}
    step.close()
    median = times[len(times) // 2]
    return {
        "ms": 1e3 * median, "ms_min": 1e3 * times[0], "ms_max": 1e3 * times[-1],
        "tokens_per_second": batch * length * world.size / median, "peak_gb": peak / 1e9,
        "graphed": graphed, **profile,
    }  # fmt: skip


def _overlap(take: Callable[[], float]) -> dict[str, float]:
    """Of one step: how long NCCL's kernels ran, and how much of that while others ran too."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        take()
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profiler.events():
        if event.device_type.name == "CUDA" and "Mem" not in event.name:
            span = (event.time_range.start, event.time_range.end)
            spans["nccl" in event.name.lower()].append(span)
    sent, computed = _union(spans[True]), _union(spans[False])
    both = _length(sent) + _length(computed) - _length(_union([*sent, *computed]))
    return {"nccl_ms": _length(sent) / 1e3, "nccl_beside_others_ms": both / 1e3}


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


# Models


def random_model(
    prefix: str, options: dict[str, Any], device: torch.device, dtype: torch.dtype,
    quantize: str | None,
) -> Any:  # fmt: skip
    """A model of transformers with random weights, the same in every process."""
    import transformers

    # The adapter's first values come from here too.
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(
        **options, pad_token_id=0, bos_token_id=0, eos_token_id=0
    )
    return random_quantized(config, device, dtype, quantize)[0]


def named_trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What trains, by name."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def trained_of(model: nn.Module) -> list[nn.Parameter]:
    """What trains."""
    return [parameter for _, parameter in named_trained(model)]


def _whole(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


if __name__ == "__main__":
    main(*sys.argv[1:])
