"""The fine-tuning jobs that must fit: what is trained, and what it may take."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.training.sizes import SIZES

GB = 1e9
Limits = Sequence[float | None]
"""(ms, GB of 1e9 bytes); None for no limit."""
LEAST = "least"
"""As a budget: the smallest that the memory plan lets the job run in."""
CONFIGURATIONS = 2
"""Among how many of theirs upstream's Mamba-2 kernels choose; among all it takes minutes."""
PRODIAL, FROZEN, PEFT = "prodial", "frozen", "peft"
"""What is trained: both projectors of every mixer; nothing, with a gradient through every block, at
the same levels; the same projectors by PEFT, see ``rivals.py``."""


@dataclass(frozen=True)
class Job:
    """One row: what to train, how, and what it may take.

    Attributes:
        name: Unique.
        model: Key of :data:`~benchmarks.training.sizes.SIZES`.
        batch: Sequences.
        length: Tokens of one.
        quantize: As ``prodial finetune`` has it, like the next four; None for bf16.
        quantize_modules: Likewise, and so is ``experts``.
        experts: Where they are.
        memory_budget: Likewise, or :data:`LEAST`; None for what the device has.
        activations: Likewise.
        cuda_graph: Likewise.
        library: Whose blocks: ``"transformers"``, which the command line trains, or
            ``"mamba_ssm"``, which has no memory plan.
        must: Most (ms, GB of 1e9 bytes); None for no limit.
        aim: Likewise.
        before: What LoRA took on mamba_ssm's blocks with the fast path off, likewise: the steps of
            the same kind, eager or captured.
        method: :data:`PRODIAL`, :data:`FROZEN` or :data:`PEFT`.
    """

    name: str
    model: str
    batch: int
    length: int
    quantize: str | None = None
    memory_budget: str | None = None
    activations: str = "auto"
    cuda_graph: str = "auto"
    library: str = "transformers"
    must: Limits = (None, None)
    aim: Limits = (None, None)
    before: Limits = (None, None)
    quantize_modules: str = "projectors"
    experts: str = "auto"
    method: str = PRODIAL

    @property
    def title(self) -> str:
        """For people."""
        everything = ", all" if self.quantize_modules == "all" else ""
        whose = {PRODIAL: "", FROZEN: ", frozen", PEFT: ", PEFT"}[self.method]
        return (
            f"{self.model} {self.batch}×{self.length} {self.quantize or 'bf16'}{everything}{whose}"
        )

    def rivals(self) -> tuple[Job, Job]:
        """The same model frozen, and with PEFT's adapters: what its tokens a second are held to."""
        frozen, peft = (
            replace(
                self, name=f"{self.name}+{method}", method=method, must=(None, None),
                aim=(None, None), before=(None, None),
            )
            for method in (FROZEN, PEFT)
        )  # fmt: skip
        return frozen, replace(peft, memory_budget=None, experts="auto")

    def options(self) -> dict[str, Any]:
        """What differs from the defaults of ``prodial finetune``, without model and budget."""
        chosen: dict[str, Any] = {"batch_size": self.batch, "seq_len": self.length}
        for name, default in (
            ("quantize", None), ("quantize_modules", "projectors"), ("activations", "auto"),
            ("cuda_graph", "auto"), ("experts", "auto"),
        ):  # fmt: skip
            if getattr(self, name) != default:
                chosen[name] = getattr(self, name)
        return chosen

    def command(self, memory_budget: str | None) -> str | None:
        """The line that runs it on real weights; None where the command line cannot."""
        if self.library != "transformers" or self.method != PRODIAL:
            return None
        options = {"model": SIZES[self.model].published, "data": "notes.txt", **self.options()}
        if memory_budget is not None:
            options["memory_budget"] = memory_budget
        flags = (f"--{k.replace('_', '-')} {shlex.quote(str(v))}" for k, v in options.items())
        return " ".join(["prodial finetune", *flags])


_SSM: dict[str, Any] = {"library": "mamba_ssm"}
_BF16_1B: dict[str, Any] = {"aim": (300, 6), "before": (451, 38.053)}
_130M: dict[str, Any] = {"cuda_graph": "on", "must": (16, None), "aim": (14, None)}
_1B: dict[str, Any] = {"cuda_graph": "on", "must": (78, None), "aim": (65, None)}
# The whole frozen model in 4 bits.
_WHOLE: dict[str, Any] = {"quantize": "nf4", "quantize_modules": "all"}
_LEAN: dict[str, Any] = {**_WHOLE, "activations": "offload"}
WHOLE_JOBS = (
    Job(
        "30b-a3b-all", "nemotron-3-nano-30b-a3b", 1, 2048, must=(None, 24), aim=(None, 20),
        memory_budget="24GB", **_WHOLE,
    ),
    Job(
        "30b-a3b-streamed", "nemotron-3-nano-30b-a3b", 1, 2048, must=(None, 12), aim=(None, 8),
        experts="host", activations="checkpoint", **_WHOLE,
    ),
    Job("30b-a3b-all-lean", "nemotron-3-nano-30b-a3b", 1, 2048, aim=(None, 20), **_LEAN),
    Job(
        "nemotron-8b-all", "nemotron-h-8b", 1, 2048, must=(None, 8), aim=(None, 6.5),
        memory_budget="8GB", **_WHOLE,
    ),
    Job("nemotron-8b-all-lean", "nemotron-h-8b", 1, 2048, aim=(None, 6.5), **_LEAN),
    Job(
        "nano-4b-all", "nemotron-3-nano-4b", 1, 2048, must=(None, 5), aim=(None, 4),
        memory_budget="5GB", **_WHOLE,
    ),
    Job("nano-4b-all-lean", "nemotron-3-nano-4b", 1, 2048, aim=(None, 4), **_LEAN),
    Job("7b-all-lean", "falcon-mamba-7b", 1, 2048, must=(None, 5.5), aim=(None, 5), **_LEAN),
    Job("granite-micro-all", "granite-4.0-h-micro", 1, 2048, memory_budget="4GB", **_WHOLE),
    Job("falcon-h1-7b-all", "falcon-h1-7b", 1, 2048, memory_budget="8GB", **_WHOLE),
    Job("bamba-9b-all", "bamba-9b", 1, 2048, memory_budget="10GB", **_WHOLE),
    Job("zamba2-7b-all", "zamba2-7b", 1, 2048, memory_budget="8GB", **_WHOLE),
    Job(
        "1.4b-bf16-filled", "mamba-1.4b", 4, 2048, activations="offload", memory_budget="6.15GB",
        must=(310, 5),
    ),
    Job(
        "1.4b-bf16-lean", "mamba-1.4b", 4, 2048, activations="offload", must=(None, 5),
        aim=(None, 4.5),
    ),
)  # fmt: skip

JOBS = (
    Job(
        "1.4b-bf16", "mamba-1.4b", 4, 2048, memory_budget="8GB", must=(350, 8), **_BF16_1B
    ),
    Job("1.4b-bf16-least", "mamba-1.4b", 4, 2048, memory_budget=LEAST, **_BF16_1B),
    Job(
        "1.4b-nf4", "mamba-1.4b", 4, 2048, "nf4", "5.5GB", must=(380, 5.5), aim=(320, 4)
    ),
    Job("1.4b-nf4-least", "mamba-1.4b", 4, 2048, "nf4", LEAST, aim=(320, 4)),
    Job("2.8b-nf4", "mamba-2.8b", 1, 2048, "nf4", "6GB", must=(None, 6), aim=(None, 4)),
    Job("2.8b-nf4-least", "mamba-2.8b", 1, 2048, "nf4", LEAST, aim=(None, 4)),
    Job("7b-nf4", "falcon-mamba-7b", 1, 2048, "nf4", "11GB", must=(None, 11), aim=(None, 8)),
    Job("7b-nf4-least", "falcon-mamba-7b", 1, 2048, "nf4", LEAST, aim=(None, 8)),
    Job("130m-graphed", "mamba-130m", 4, 512, **_130M, **_SSM, before=(24.2, None)),
    Job("130m-graphed-hf", "mamba-130m", 4, 512, **_130M, before=(24.2, None)),
    Job("1.4b-graphed", "mamba-1.4b", 4, 512, **_1B, **_SSM, before=(113, None)),
    Job("1.4b-graphed-hf", "mamba-1.4b", 4, 512, **_1B, before=(113, None)),
    Job("130m-32k", "mamba-130m", 1, 32768, activations="checkpoint"),
    Job("1.4b-32k", "mamba-1.4b", 1, 32768, activations="checkpoint"),
)  # fmt: skip
MORE_JOBS = (
    # The host's time, which other processes spoil: by name, and alone.
    Job("130m-eager", "mamba-130m", 4, 512, cuda_graph="off", **_SSM, before=(87, 2.57)),
    Job("1.4b-eager", "mamba-1.4b", 4, 512, cuda_graph="off", **_SSM, before=(206, 11.2)),
    # Asked for by name: the same on the other library's blocks.
    Job(
        "1.4b-bf16-ssm", "mamba-1.4b", 4, 2048, activations="checkpoint", **_SSM, must=(350, 8),
        **_BF16_1B,
    ),
    Job(
        "1.4b-nf4-ssm", "mamba-1.4b", 4, 2048, "nf4", activations="checkpoint", **_SSM,
        must=(380, 5.5), aim=(320, 4),
    ),
    Job(
        "2.8b-nf4-ssm", "mamba-2.8b", 1, 2048, "nf4", activations="checkpoint", **_SSM,
        must=(None, 6), aim=(None, 4),
    ),
    Job("130m-32k-ssm", "mamba-130m", 1, 32768, activations="checkpoint", **_SSM),
)  # fmt: skip
EVERY_JOB = (*JOBS, *MORE_JOBS, *WHOLE_JOBS)
TINY_JOBS = (
    Job("tiny", "tiny", 2, 32, must=(60_000, 8), aim=(1e-3, 8), before=(9e4, 9)),
    Job("tiny-nf4", "tiny", 2, 32, "nf4", activations="checkpoint"),
    Job("tiny-all", "tiny-moe", 2, 32, experts="host", **_LEAN),
)  # fmt: skip


@dataclass
class JobRow:
    """What one job took, or the ``error`` that it failed with; the first fields are the job's.

    Attributes:
        memory_budget: What it was given; :data:`LEAST` is worked out.
        graphed: Whether its steps were captured; ``how`` is what was said about it.
        levels: Number of layers at each memory level.
        predicted_bytes: The planned peak.
    """

    name: str
    model: str = ""
    batch: int = 0
    length: int = 0
    quantize: str | None = None
    memory_budget: str | None = None
    activations: str = "auto"
    cuda_graph: str = "auto"
    library: str = "transformers"
    must: Limits = (None, None)
    aim: Limits = (None, None)
    before: Limits = (None, None)
    title: str = ""
    command: str | None = None
    graphed: bool = False
    how: str = ""
    levels: Mapping[str, int] = field(default_factory=dict)
    ms: float = 0.0
    slowest_ms: float = 0.0
    steps: int = 0
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    predicted_bytes: int | None = None
    trained: int = 0
    quantize_modules: str = "projectors"
    experts: str = "auto"
    method: str = PRODIAL
    build_s: float = 0.0
    total_s: float = 0.0
    kernels_us: Mapping[str, float] | None = None
    error: str | None = None

    @property
    def status(self) -> str:
        """See :mod:`benchmarks.harness.rows`."""
        return self.error or "ok"

    @property
    def tokens_per_second(self) -> float:
        """Of the timed steps."""
        return self.batch * self.length / self.ms * 1e3

    @property
    def ok(self) -> bool:
        """Whether it was measured, and keeps what it must."""
        return self.error is None and self.keeps(self.must)

    def keeps(self, limits: Limits) -> bool:
        """Whether it is within limits (ms, GB); a figure that was not taken is."""
        figures = (self.ms, None if self.peak_bytes is None else self.peak_bytes / GB)
        pairs = zip(figures, limits, strict=True)
        return all(figure is None or limit is None or figure <= limit for figure, limit in pairs)
