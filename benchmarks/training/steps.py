"""A fine-tuning job on random weights of the real dimensions: planned, built, and timed.

What the command line would do with a checkpoint is done by the package's own functions: its plan
chooses what the layers keep, PyTorch is held to the budget from the first weight on, and its step
is taken. The learning rate is small: on random weights a usual one makes ``B A x`` larger than
``W x`` within a few steps, which no fine-tuning of a trained model does, and then the kernels sum
the scale's gradient by another, slower way.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from benchmarks.harness.memory import release
from benchmarks.harness.profiling import kernel_times
from benchmarks.models import upstream
from benchmarks.training.jobs import CONFIGURATIONS, FROZEN, LEAST, PEFT, PRODIAL, Job, JobRow
from benchmarks.training.random_weights import random_packed
from benchmarks.training.rivals import train_nothing, with_peft
from benchmarks.training.sizes import SIZES, transformers_config
from prodial_kernels import quantize_model
from prodial_kernels.models.layers.recompute import CHECKPOINT, KEEP, prepare_blocks
from prodial_kernels.training.config import FinetuneConfig, ResolvedConfig
from prodial_kernels.training.data.batches import BatchSizes
from prodial_kernels.training.data.packing import PackedBatches
from prodial_kernels.training.memory.allocator import grow_segments
from prodial_kernels.training.memory.device import limited
from prodial_kernels.training.memory.plan import MemoryPlanError
from prodial_kernels.training.memory.run_plan import RunPlan, block_levels, plan_run
from prodial_kernels.training.method import prepare_method
from prodial_kernels.training.step.choose import decide, facts_of, make_step
from prodial_kernels.training.step.eager import EagerStep, TrainingStep
from prodial_kernels.training.step.graphed import WARM_UP, GraphedStep
from prodial_kernels.training.step.loss import make_loss
from prodial_kernels.training.step.tuning import tune

LR = 1e-5


@dataclass(frozen=True)
class JobTask:
    """A job in a process of its own, so that a peak and a limit are that job's alone.

    Attributes:
        steps: How many are timed.
        loss, optimizer: As ``prodial finetune`` has them.
        profile: Take the kernels' times too.
    """

    job: Job
    steps: int
    loss: str = "auto"
    optimizer: str = "adamw"
    profile: bool = False
    seconds: float = 30.0
    bytes: int = 8 << 30

    def prepare(self, device: str, alone: AbstractContextManager[object]) -> PreparedJob:
        """Plan the job, hold PyTorch to its budget, build the model and take the first steps.

        On ``"cpu"`` nothing is planned.

        Raises:
            ConfigError: An option that cannot be used.
            MemoryPlanError: The job does not fit into its budget.
        """
        started = time.perf_counter()
        if device == "cuda":
            upstream.load(CONFIGURATIONS)
        if self.job.memory_budget is not None:
            # Read when CUDA starts, which has not happened yet.
            grow_segments()
        place = torch.device(device)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        options = {"loss": self.loss, "optimizer": self.optimizer}
        config, plan = plan_of(self.job, place, dtype, **options)
        held = ExitStack()
        with ExitStack() as stack:
            # The plan is not of the frozen model, whose own blocks may take more.
            held_to = None if plan is None or self.job.method == FROZEN else plan.allowed
            stack.enter_context(limited(place, held_to))
            training = Training(self.job, config, plan, place, dtype, started, alone)
            held = stack.pop_all()
        return PreparedJob(self, training, held)

    def rows(self, status: str) -> list[JobRow]:
        """Its row where there are no figures, with the reason."""
        return [JobRow(self.job.name, error=status)]


@dataclass
class PreparedJob:
    """A job that has taken its first steps, and what holds PyTorch to its budget."""

    task: JobTask
    training: Training
    held: ExitStack

    def measure(self) -> list[JobRow]:
        """The job's row."""
        with self.held:
            # What was free meanwhile went back to the device: a step takes it again.
            self.training.take()
            return [self.training.measure(self.task.steps, profile=self.task.profile)]


def plan_of(
    job: Job, place: torch.device, dtype: torch.dtype, **options: Any
) -> tuple[ResolvedConfig, RunPlan | None]:
    """Return what the command line would run, and its memory plan; see :class:`JobTask`."""
    least = job.memory_budget == LEAST
    budget = None if least else job.memory_budget
    with TemporaryDirectory() as folder:
        planned = job.library == "transformers" and job.method != PEFT
        if planned:
            transformers_config(job.model).save_pretrained(folder)
        config = FinetuneConfig(
            model=folder if planned else "embedded", lr=LR, memory_budget=budget,
            **{**job.options(), **options},
        ).resolved()  # fmt: skip
        if not planned:
            return config, None
        if least:
            config = replace(config, memory_budget=least_budget(config, place, dtype))
        return config, plan_run(config, place, dtype)[1]


def least_budget(config: ResolvedConfig, place: torch.device, dtype: torch.dtype) -> str | None:
    """The smallest budget that a run's plan accepts, in steps of 0.1 GB; None without a plan."""
    _, run = plan_run(replace(config, activations="checkpoint"), place, dtype)
    if run is None:
        return None
    tenths = math.ceil(run.plan.needed / 1e8)
    # A mixture of levels can take a little less than the leanest one everywhere.
    with suppress(MemoryPlanError):
        while True:
            plan_run(replace(config, memory_budget=f"{(tenths - 1) / 10:g}GB"), place, dtype)
            tenths -= 1
    return f"{tenths / 10:g}GB"


class Training:
    """A job whose next step is an ordinary one: compiled and, if it is to be, captured."""

    def __init__(
        self, job: Job, config: ResolvedConfig, plan: RunPlan | None, place: torch.device,
        dtype: torch.dtype, started: float, alone: AbstractContextManager[object],
    ) -> None:  # fmt: skip
        """Build it, and take the first steps; see :class:`JobTask`."""
        self._job = job
        self._config = config
        self._plan = plan
        self._cuda = place.type == "cuda"
        self._started = started
        self._said: list[str] = []
        torch.manual_seed(0)
        if job.method == PEFT:
            # Dense for a moment.
            with alone:
                self.model, optimizer = with_peft(job, place, dtype, LR)
                release(place.type)
            self.levels = (CHECKPOINT,) * SIZES[job.model].layers
            self._step: TrainingStep = EagerStep(
                make_loss(self.model, "full"), optimizer, clip=config.clip
            )
        else:
            self.model = build(job, place, dtype)
            if job.method == PRODIAL:
                optimizer = prepare_method(self.model, config).optimizer
            levels = block_levels(self.model, config.chosen_activations, plan)
            self.levels = levels or (KEEP,) * SIZES[job.model].layers
            prepare_blocks(self.model, self.levels, device=place)
            if job.method == FROZEN:
                optimizer = train_nothing(self.model, LR)
            choice = decide(
                config, facts_of(self.model), place, checkpoints=CHECKPOINT in self.levels
            )
            self._step = make_step(
                self.model, optimizer, config, choice, device=place, say=self._said.append
            )
        vocabulary = SIZES[job.model].vocabulary
        tokens = torch.randint(0, vocabulary, (job.batch * job.length * 4,), dtype=torch.int32)
        self._batches = PackedBatches(tokens, BatchSizes(job.length, job.batch))
        self.model.train()
        release(place.type, workspaces=True)
        self._built = time.perf_counter()
        if plan is not None and plan.plan.tuning_tokens:
            tune(self.model, plan.plan.tuning_tokens)
            release(place.type, workspaces=True)
        self._taken = 0
        # These compile, make the moments and, where steps are captured, are the eager ones.
        for _ in range(WARM_UP):
            self.take()
        release(place.type, workspaces=True)
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        self.take()
        self.take()

    def take(self) -> float:
        """Take a step and wait for it; return its seconds.

        Raises:
            RuntimeError: Its loss or gradient is not finite.
        """
        before = time.perf_counter()
        self._step.begin([self._batches.batch(self._taken)], LR)
        result = self._step.finish()
        if self._cuda:
            torch.cuda.synchronize()
        if not result.finite:
            raise RuntimeError(f"{self._job.name}: step {self._taken} gave {result}")
        self._taken += 1
        return time.perf_counter() - before

    def measure(self, steps: int, *, profile: bool = False) -> JobRow:
        """Time steps; return the row, with ``profile`` each kernel's time too."""
        job, plan, cuda = self._job, self._plan, self._cuda
        times = [self.take() for _ in range(steps)]
        row = JobRow(
            **{**asdict(job), "memory_budget": self._config.memory_budget},
            title=job.title, command=job.command(self._config.memory_budget),
            graphed=isinstance(self._step, GraphedStep) and self._step.captures,
            how="; ".join(self._said) or "steps launched one by one",
            levels=dict(Counter(self.levels)),
            ms=statistics.median(times) * 1e3, slowest_ms=max(times) * 1e3, steps=steps,
            peak_bytes=torch.cuda.max_memory_allocated() if cuda else None,
            reserved_bytes=torch.cuda.max_memory_reserved() if cuda else None,
            predicted_bytes=(
                plan.plan.peak.total if plan is not None and job.method == PRODIAL else None
            ),
            trained=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            build_s=self._built - self._started, total_s=time.perf_counter() - self._started,
        )  # fmt: skip
        if profile:
            row.kernels_us = kernel_times(self._again, "cuda" if cuda else "cpu")
        return row

    def _again(self) -> None:
        self.take()


def build(job: Job, place: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return the job's model with random weights; it is never dense where it is quantised."""
    if job.library == "transformers":
        config = transformers_config(job.model)
        return random_packed(
            config, place, dtype, job.quantize, job.quantize_modules,
            experts_on_host=job.experts == "host",
        )  # fmt: skip
    from mamba_ssm import MambaLMHeadModel
    from mamba_ssm.models.config_mamba import MambaConfig

    sizes = SIZES[job.model]
    model: nn.Module = MambaLMHeadModel(
        MambaConfig(
            d_model=sizes.width, n_layer=sizes.layers, vocab_size=sizes.vocabulary,
            ssm_cfg={"layer": "Mamba1"},
        ),
        device=place, dtype=dtype,
    )  # fmt: skip
    if job.quantize is not None:
        quantize_model(model, job.quantize)
    return model
