"""The fine-tuning jobs that must fit: models of the real sizes with random weights, whole steps.

A job builds its model on the device, adapts both projectors with r = 16, and takes steps as
``prodial finetune`` does: its loss, its optimiser, its CUDA graphs.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.breakdown import kernel_times
from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.quantization.blocks import dynamic_map
from prodial_kernels.quantization.nf4 import BLOCKSIZE, NESTED_BLOCKSIZE, NF4_TABLE, NF4Linear
from prodial_kernels.training.activations import apply_levels
from prodial_kernels.training.batches import TrainingBatches
from prodial_kernels.training.buckets import Buckets
from prodial_kernels.training.graphed import WARM_UP, GraphedStep, choose_graph
from prodial_kernels.training.loss import make_loss
from prodial_kernels.training.optimizers import make_optimizer
from prodial_kernels.training.packing import PackedBatches
from prodial_kernels.training.parameter_groups import adapter_parameter_groups
from prodial_kernels.training.step import EagerStep, TrainingStep

RANK = 16
GB = 1e9


@dataclass(frozen=True)
class Sizes:
    """A model: width, layers, words, and the library whose blocks it is made of."""

    width: int
    layers: int
    vocabulary: int
    library: str = "mamba_ssm"


MODELS = {
    "mamba-130m": Sizes(768, 24, 50277),
    "mamba-1.4b": Sizes(2048, 48, 50277),
    "mamba-2.8b": Sizes(2560, 64, 50277),
    "falcon-mamba-7b": Sizes(4096, 64, 65024, "transformers"),
    "tiny": Sizes(32, 4, 512, "transformers"),
}


@dataclass(frozen=True)
class Job:
    """One row: what to train, and what it may take.

    Attributes:
        name: Unique.
        model: Key of :data:`MODELS`.
        batch: Sequences.
        length: Tokens of one.
        base: ``"bf16"`` or ``"nf4"``.
        cuda_graph: ``"on"``, ``"off"`` or ``"auto"``.
        level: What every block keeps for backward, as ``prodial finetune --activations`` has it.
        segment: Blocks that are recomputed together from what enters them, instead of a level.
        recompute_xz: Make ``in_proj``'s output again in backward, within a segment.
        library: Whose blocks, where not those of :data:`MODELS`.
        must: Most (ms, GB of 1e9 bytes); None for no limit.
        aim: Likewise.
    """

    name: str
    model: str
    batch: int
    length: int
    base: str = "bf16"
    cuda_graph: str = "auto"
    level: str = "keep"
    segment: int = 0
    recompute_xz: bool = False
    library: str | None = None
    must: tuple[float | None, float | None] = (None, None)
    aim: tuple[float | None, float | None] = (None, None)

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.model} {self.batch}×{self.length} {self.base}"


_HF, _SSM = "transformers", "mamba_ssm"
_SEGMENTS: dict[str, Any] = {"segment": 4, "recompute_xz": True}
JOBS = (
    # What must be small runs as the command line runs it: transformers' blocks, levels of the plan.
    Job(
        "1.4b-bf16", "mamba-1.4b", 4, 2048, level="checkpoint", library=_HF,
        must=(350, 8), aim=(300, 6),
    ),
    Job(
        "1.4b-nf4", "mamba-1.4b", 4, 2048, "nf4", level="checkpoint", library=_HF,
        must=(380, 5.5), aim=(320, 4),
    ),
    Job(
        "2.8b-nf4", "mamba-2.8b", 1, 2048, "nf4", level="checkpoint", library=_HF,
        must=(None, 6), aim=(None, 4),
    ),
    Job(
        "7b-nf4", "falcon-mamba-7b", 1, 2048, "nf4", level="checkpoint",
        must=(None, 11), aim=(None, 8),
    ),
    Job("130m-graphed", "mamba-130m", 4, 512, cuda_graph="on", must=(16, None), aim=(14, None)),
    Job("130m-eager", "mamba-130m", 4, 512, cuda_graph="off"),
    Job("1.4b-graphed", "mamba-1.4b", 4, 512, cuda_graph="on", must=(78, None), aim=(65, None)),
    Job("1.4b-eager", "mamba-1.4b", 4, 512, cuda_graph="off"),
    Job("130m-32k", "mamba-130m", 1, 32768, level="checkpoint", library=_HF),
)  # fmt: skip
MORE_JOBS = (
    # Asked for by name: the same on the other library's blocks.
    Job(
        "1.4b-bf16-ssm", "mamba-1.4b", 4, 2048, **_SEGMENTS, library=_SSM,
        must=(350, 8), aim=(300, 6),
    ),
    Job(
        "1.4b-nf4-ssm", "mamba-1.4b", 4, 2048, "nf4", **_SEGMENTS, library=_SSM,
        must=(380, 5.5), aim=(320, 4),
    ),
    Job(
        "2.8b-nf4-ssm", "mamba-2.8b", 1, 2048, "nf4", **_SEGMENTS, library=_SSM,
        must=(None, 6), aim=(None, 4),
    ),
    Job("130m-32k-ssm", "mamba-130m", 1, 32768, **_SEGMENTS, library=_SSM),
    Job(
        "130m-graphed-hf", "mamba-130m", 4, 512, cuda_graph="on", library=_HF,
        must=(16, None), aim=(14, None),
    ),
    Job(
        "1.4b-graphed-hf", "mamba-1.4b", 4, 512, cuda_graph="on", library=_HF,
        must=(78, None), aim=(65, None),
    ),
)  # fmt: skip
TINY_JOBS = (
    Job("tiny", "tiny", 2, 32, must=(60_000, 8), aim=(1e-3, 8)),
    Job("tiny-nf4", "tiny", 2, 32, "nf4", level="checkpoint"),
)


def build(job: Job, device: str) -> nn.Module:
    """Return the job's model, adapted and in training mode, with random weights."""
    sizes = MODELS[job.model]
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = _BUILDERS[library_of(job)](sizes, device, dtype)
    if job.base == "nf4":
        randomly_quantise(model)
    apply_prodial(model, ProdialConfig(r=RANK))
    for module in model.modules():
        if hasattr(module, "in_proj") and job.recompute_xz:
            module.prodial_recompute_xz = True  # type: ignore[assignment]
    if job.segment:
        recompute_in_segments(model, job.segment)
    else:
        apply_levels(model, [job.level] * sizes.layers)
    return model.train()


def library_of(job: Job) -> str:
    """Whose blocks the job's model is made of."""
    return job.library or MODELS[job.model].library


def _mamba_ssm(sizes: Sizes, device: str, dtype: torch.dtype) -> nn.Module:
    from mamba_ssm import MambaLMHeadModel
    from mamba_ssm.models.config_mamba import MambaConfig

    config = MambaConfig(
        d_model=sizes.width, n_layer=sizes.layers, vocab_size=sizes.vocabulary,
        ssm_cfg={"layer": "Mamba1"},
    )  # fmt: skip
    model: nn.Module = MambaLMHeadModel(config, device=device, dtype=dtype)
    return model


def _transformers(sizes: Sizes, device: str, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    falcon = sizes is MODELS["falcon-mamba-7b"]
    config = AutoConfig.for_model(
        "falcon_mamba" if falcon else "mamba", hidden_size=sizes.width, state_size=16,
        num_hidden_layers=sizes.layers, vocab_size=sizes.vocabulary, use_cache=False,
        tie_word_embeddings=not falcon,
    )  # fmt: skip
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


_BUILDERS = {"mamba_ssm": _mamba_ssm, "transformers": _transformers}


def randomly_quantise(model: nn.Module) -> None:
    """Put layers of random NF4 codes in the projectors' places: their cost is that of real ones."""
    for module in list(model.modules()):
        for name in ("in_proj", "out_proj"):
            linear = getattr(module, name, None)
            if isinstance(linear, nn.Linear):
                setattr(module, name, _random_nf4(linear))


def _random_nf4(linear: nn.Linear) -> NF4Linear:
    weight = linear.weight
    device, count = weight.device, weight.numel()
    blocks = -(-count // BLOCKSIZE)

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

    # Uniform codes have a root mean square of a half: weights as large as in a fresh layer.
    mean = torch.tensor(linear.in_features**-0.5, device=device)
    spread = torch.full((-(-blocks // NESTED_BLOCKSIZE),), float(mean) / 10, device=device)
    return NF4Linear(
        linear.in_features, linear.out_features, linear.bias, weight.dtype,
        codes=codes(-(-count // 2), 1), absmax=codes(blocks),
        quant_map=torch.tensor(NF4_TABLE, device=device),
        nested=(spread, dynamic_map().to(device), mean),
    )  # fmt: skip


class Segment(nn.Module):
    """Blocks in a row, recomputed in backward from what enters the first."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, *state: Any, **options: Any) -> Any:
        """What the last block returns; blocks take what the one before returns."""
        # Nothing here is random; keeping the generator's state cannot be captured.
        return checkpoint(
            self._run, *state, use_reentrant=False, preserve_rng_state=False, **options
        )

    def _run(self, *state: Any, **options: Any) -> Any:
        output: Any = state
        for block in self.blocks:
            output = block(*(output if isinstance(output, tuple) else (output,)), **options)
        return output


def recompute_in_segments(model: nn.Module, length: int) -> None:
    """Recompute the blocks of a Mamba model, ``length`` of them at a time."""
    backbone: Any = model.backbone
    blocks = list(backbone.layers)
    backbone.layers = nn.ModuleList(
        [Segment(blocks[i : i + length]) for i in range(0, len(blocks), length)]
    )


def make_batches(job: Job) -> TrainingBatches:
    """Windows of random tokens."""
    vocabulary = MODELS[job.model].vocabulary
    tokens = torch.randint(0, vocabulary, (job.batch * job.length * 4,), dtype=torch.int32)
    return PackedBatches(tokens, seq_len=job.length, batch_size=job.batch)


def make_step(
    model: nn.Module, job: Job, device: str, *, loss: str = "auto", optimizer: str = "adamw"
) -> tuple[TrainingStep, str]:
    """Return what takes the job's steps, and how it does."""
    place = torch.device(device)
    choice = choose_graph(job.cuda_graph, device=place, tokens=job.batch * job.length)
    chosen, _ = make_loss(model, loss, graphed=choice.graphed)
    groups = adapter_parameter_groups(model, weight_decay=0.01)
    made = make_optimizer(optimizer, groups, lr=1e-3, device=place)
    how = f"{'graphed' if choice.graphed else 'eager'}, {chosen.name} loss, {optimizer}"
    if not choice.graphed:
        return EagerStep(chosen, made, clip=1.0), how
    from prodial_kernels.training.cuda_graphs import CudaGraphs

    buckets = Buckets(job.batch, job.length)
    return GraphedStep(chosen, made, buckets, CudaGraphs(place), clip=1.0, required=True), how


def measure(
    job: Job, device: str, *, steps: int = 10, loss: str = "auto", optimizer: str = "adamw",
    profile: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Build and train; return the row's figures, with ``profile`` each kernel's time too."""
    cuda = device == "cuda"
    started = time.perf_counter()
    model = build(job, device)
    step, how = make_step(model, job, device, loss=loss, optimizer=optimizer)
    batches = make_batches(job)
    release(cuda)
    built = time.perf_counter()

    def take(number: int) -> float:
        before = time.perf_counter()
        step.begin([batches.batch(number)], 1e-3)
        result = step.finish()
        if cuda:
            torch.cuda.synchronize()
        if not result.finite:
            raise RuntimeError(f"{job.name}: step {number} gave {result}")
        return time.perf_counter() - before

    # The first steps compile, make the moments and, graphed, are the eager ones.
    for number in range(WARM_UP):
        take(number)
    release(cuda)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    take(WARM_UP)
    take(WARM_UP + 1)
    times = [take(WARM_UP + 2 + i) for i in range(steps)]
    peaks = {
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
    }

    def again() -> None:
        take(WARM_UP + 2)

    kernels = {"kernels_us": kernel_times(again, device)} if profile else {}
    return {
        **asdict(job), "library": library_of(job), "title": job.title, "how": how,
        "ms": statistics.median(times) * 1e3,
        "slowest_ms": max(times) * 1e3, "steps": steps,
        **peaks, **kernels,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "build_s": built - started, "total_s": time.perf_counter() - started,
    }  # fmt: skip


def release(cuda: bool) -> None:
    """Return what nothing refers to any more, so that no build or warm-up counts for a peak."""
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def keeps(row: dict[str, Any], limits: Sequence[float | None]) -> bool:
    """Whether a row is within limits (ms, GB); a figure that was not taken is."""
    figures = (row["ms"], None if row["peak_bytes"] is None else row["peak_bytes"] / GB)
    pairs = zip(figures, limits, strict=True)
    return all(figure is None or limit is None or figure <= limit for figure, limit in pairs)
