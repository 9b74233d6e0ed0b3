"""How a run takes its steps and what memory it plans with, before any weight is loaded."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from prodial_kernels.kernels.choices.tile_sizes import DeviceLimits
from prodial_kernels.models.layers.fused_norms import fuse_norms
from prodial_kernels.models.layers.recompute import CHECKPOINT, KEEP, OFFLOAD
from prodial_kernels.models.mixers.cuda_functions import kernels_available
from prodial_kernels.training.config import ResolvedConfig
from prodial_kernels.training.memory.allocator import SETTING, VARIABLE, segments_grow
from prodial_kernels.training.memory.device import MeasuredMemory, usable_bytes
from prodial_kernels.training.memory.part_bytes import HOPPER
from prodial_kernels.training.memory.peak import Job
from prodial_kernels.training.memory.plan import (
    AUTO,
    DeviceMemory,
    MemoryPlan,
    MemoryPlanError,
    level_plans,
    plan_memory,
    what_would_fit,
)
from prodial_kernels.training.memory.shapes import MAMBA2, ModelShape, describe_model
from prodial_kernels.training.method import trained_on_meta
from prodial_kernels.training.sizes import parse_budget, size_text
from prodial_kernels.training.step.choose import StepChoice, decide, facts_of
from prodial_kernels.training.step.chunked_loss import chunk_rows
from prodial_kernels.training.step.tuning import is_tuned

# cuBLAS keeps 32 MiB for a thread and stream from Hopper on, about 8 MiB before.
_WORKSPACE = {True: 32 * 2**20, False: 8 * 2**20}
_FIXED_SEGMENTS = (
    f"{VARIABLE} does not say {SETTING}, with which there are fewer gaps: they may take more than "
    "is left for them. 'prodial finetune' sets it; in Python, set it before CUDA starts"
)
# A second plan after an out-of-memory aims below what the first one predicted.
_LESS = 0.9


@dataclass(frozen=True)
class RunPlan:
    """A run's memory plan, and what it was made from.

    Attributes:
        plan: The plan.
        model: The model's shape.
        job: The job.
        activations: What the options ask for.
        device: The device's constants.
        limit: Bytes that the run must not exceed; None where none was given.
    """

    plan: MemoryPlan
    model: ModelShape
    job: Job
    activations: str
    device: DeviceMemory
    limit: int | None

    @property
    def allowed(self) -> int | None:
        """Bytes that PyTorch's allocator may hold: the limit without the CUDA context."""
        return None if self.limit is None else self.limit - self.device.context

    def __str__(self) -> str:
        if self.limit is None or segments_grow():
            return str(self.plan)
        return f"{self.plan}\n{_FIXED_SEGMENTS}"

    def advice(self) -> str:
        """What would take clearly less memory than the plan, as a sentence."""
        less = int(_LESS * self.plan.peak.total) + self.plan.context
        budget = less if self.plan.budget is None else min(self.plan.budget, less)
        return what_would_fit(
            self.model, self.job, budget=budget, activations=self.activations, device=self.device
        )

    def compared(self, measured: MeasuredMemory) -> dict[str, Any]:
        """Return plan and measurement as JSON-ready values; ``ratio`` is measured to predicted."""
        return {
            "plan": self.plan.to_dict(),
            "measured": asdict(measured),
            "ratio": measured.allocated / self.plan.peak.total,
        }


def plan_run(
    config: ResolvedConfig,
    device: torch.device,
    dtype: torch.dtype,
    at_hand: nn.Module | None = None,
) -> tuple[StepChoice, RunPlan | None]:
    """Decide how a run takes its steps, and plan its memory.

    The budget is ``config.memory_budget``, else what the device has free; without a
    ``memory_budget`` a plan that does not fit is returned all the same. ``at_hand`` is the model
    where it is not loaded by its name; it is only looked at.

    Returns:
        The choice, and the plan of it; None where nothing can be predicted and no budget asks for
        it: on a CPU, for mixers whose kernels are not installed, and for models without a list of
        blocks.

    Raises:
        GraphError, LossError: As :func:`~prodial_kernels.training.step.choose.decide`.
        MemoryPlanError: The job does not fit into ``memory_budget``, or its memory cannot be
            predicted here.
        ModelError: The model's configuration cannot be read.
        ValueError: The adapter does not fit the model.
    """
    kernels = device.type == "cuda" and kernels_available()
    if not kernels and config.memory_budget is not None:
        raise MemoryPlanError(
            f"memory_budget {config.memory_budget!r} cannot be kept: {why_unknown(device)}"
        )
    if config.shard and config.memory_budget is not None:
        raise MemoryPlanError(
            f"memory_budget {config.memory_budget!r} cannot be kept with shard: what a divided "
            "model takes is not planned; leave one of them out"
        )
    model = trained_on_meta(config, dtype, at_hand)
    facts = facts_of(model)
    choice = decide(config, facts, device)
    if not kernels or config.shard:
        return choice, None
    fuse_norms(model)
    try:
        shape = describe_model(model, kernels=kernels)
    except ValueError:
        if config.memory_budget is None:
            return choice, None
        raise
    if choice.graphed and facts.draws_numbers:
        with suppress(MemoryPlanError):
            plan = _plan_of(config, shape, choice, device, dtype)
            if not {CHECKPOINT, OFFLOAD} & set(plan.plan.levels):
                return choice, plan
        # Blocks that draw numbers cannot be captured where they run again in backward.
        choice = decide(config, facts, device, checkpoints=True)
    return choice, _plan_of(config, shape, choice, device, dtype)


def _plan_of(
    config: ResolvedConfig,
    model: ModelShape,
    choice: StepChoice,
    device: torch.device,
    dtype: torch.dtype,
) -> RunPlan:
    constants = device_constants(device)
    job = job_of(config, model, choice, device, dtype)
    usable = usable_bytes(device, context=constants.context)
    limit = None if config.memory_budget is None else parse_budget(config.memory_budget)
    plan = plan_memory(
        model, job, budget=usable if limit is None else min(usable, limit),
        activations=config.chosen_activations, device=constants, strict=limit is not None,
    )  # fmt: skip
    return RunPlan(plan, model, job, config.chosen_activations, constants, limit)


def device_constants(device: torch.device) -> DeviceMemory:
    """Return what a CUDA device takes besides tensors."""
    major, _ = torch.cuda.get_device_capability(device)
    return DeviceMemory(library_workspace=_WORKSPACE[major >= 9])


def block_levels(
    model: nn.Module, activations: str, plan: RunPlan | None = None
) -> tuple[str, ...] | None:
    """Return the levels of a model's blocks: a plan's, else those asked for; None for all kept.

    Raises:
        ValueError: Without a plan, and the model has no list of blocks.
    """
    if plan is not None:
        return plan.plan.levels
    if activations in (AUTO, KEEP):
        return None
    shape = describe_model(model, kernels=kernels_available())
    return next(level_plans(shape, activations))


def why_unknown(device: torch.device) -> str:
    """Say why the memory of a run on a device cannot be predicted, as the end of a sentence."""
    if device.type != "cuda":
        return (
            "only the memory of CUDA devices can be planned, and this run is on the CPU; leave it "
            "out"
        )
    return (
        "mamba-ssm and causal-conv1d are not installed, and the memory of the code that stands in "
        "for them is not known; install them, or leave memory_budget out"
    )


def job_of(
    config: ResolvedConfig,
    model: ModelShape,
    choice: StepChoice,
    device: torch.device,
    dtype: torch.dtype,
) -> Job:
    """Return what of a configuration the memory depends on."""
    return Job(
        batch=config.batch_size,
        length=config.seq_len,
        itemsize=dtype.itemsize,
        quantize=config.quantize,
        quantize_modules=config.quantize_modules,
        experts=config.experts,
        optimizer=config.optimizer,
        loss=choice.loss,
        loss_rows=chunk_rows(model.vocabulary, dtype, device),
        graph=choice.graphed,
        # Gradients that other processes' are added to stay between steps, too.
        accumulates=config.grad_accumulation > 1 or _of_several(),
        full=config.method == "full",
        compute=config.compute or "same",
        tunes=any(layer.mixer == MAMBA2 for layer in model.layers) and not is_tuned(),
        limits=limits_of(device),
    )


def limits_of(device: torch.device) -> DeviceLimits:
    """What kernels' choices need to know of a device, with as many multiprocessors as an H200's."""
    if device.type != "cuda":
        return HOPPER
    return HOPPER._replace(capability=torch.cuda.get_device_capability(device))


def _of_several() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized()


def comparison_text(memory: dict[str, Any]) -> str:
    """Return the measured peak beside the predicted one, for people."""
    plan, measured = memory["plan"], memory["measured"]
    return (
        f"{size_text(measured['allocated'])} of tensors, predicted "
        f"{size_text(plan['allocated'])} (ratio {memory['ratio']:.2f}); "
        f"{size_text(measured['reserved'])} reserved, {size_text(measured['outside'])} outside "
        f"PyTorch (allowed for: {size_text(plan['context'])})"
    )
