"""``plan``: the memory plan of the command line for a model in anybody's training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from prodial_kernels.config import ProdialConfig
from prodial_kernels.models.adapt.inject import apply_prodial
from prodial_kernels.models.adapt.names import without_peft
from prodial_kernels.models.adapt.state import is_adapted
from prodial_kernels.models.layers.blocks import blocks_of
from prodial_kernels.models.layers.fused_norms import fuse_norms
from prodial_kernels.models.layers.head import head_obstacle
from prodial_kernels.models.layers.recompute import prepare_blocks
from prodial_kernels.models.loading.load import empty_model
from prodial_kernels.models.loading.quantized import model_on_meta
from prodial_kernels.models.mixers.cuda_functions import kernels_available
from prodial_kernels.models.patch_point import Changes
from prodial_kernels.training.memory.device import usable_bytes
from prodial_kernels.training.memory.peak import Job
from prodial_kernels.training.memory.plan import (
    AUTO,
    DeviceMemory,
    MemoryPlan,
    MemoryPlanError,
    plan_memory,
)
from prodial_kernels.training.memory.run_plan import device_constants, limits_of, why_unknown
from prodial_kernels.training.memory.shapes import describe_model
from prodial_kernels.training.method import on_meta
from prodial_kernels.training.sizes import parse_budget
from prodial_kernels.training.step.chunked_loss import chunk_rows
from prodial_kernels.training.step.loss import LossError
from prodial_kernels.training.step.model_loss import chunk_loss

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ELSEWHERE = (
    "for a GPU with mamba-ssm's and causal-conv1d's kernels; there is none here, so what it has "
    "free is not known"
)


class AppliedPlan(Changes):
    """A plan that a model trains by, until :meth:`remove`; a context manager as well."""

    def __enter__(self) -> AppliedPlan:
        """Leave it on for a block of code."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take it off."""
        self.remove()


@dataclass(frozen=True)
class TrainingPlan:
    """How a model trains within a budget. ``print`` shows it as the command line does.

    Attributes:
        plan: Levels and the predicted peak.
        job: What it was made for.
        elsewhere: Whether it is for another machine, with a GPU.
    """

    plan: MemoryPlan
    job: Job
    elsewhere: bool

    @property
    def levels(self) -> tuple[str, ...]:
        """What each block keeps for its backward pass: keep, norm, recompute or checkpoint."""
        return self.plan.levels

    @property
    def evaluation_batch(self) -> int:
        """Sequences that fit at once in an evaluation that holds whole logits."""
        return self.plan.evaluation_batch

    @property
    def total(self) -> int:
        """The predicted peak in bytes, with the CUDA context and what is left for gaps."""
        return self.plan.needed

    @property
    def fits(self) -> bool:
        """Whether that is within the budget."""
        return self.plan.fits

    def apply(self, model: nn.Module) -> AppliedPlan:
        """Let a model train so: fused norms on a GPU, its blocks' levels, the chunked loss.

        Call it after adapters are in and before a trainer takes the model; take it off with
        ``remove()`` before adapters are removed or merged.

        Args:
            model: What the plan was made for, loaded and adapted; wrappers are seen through.

        Raises:
            LossError: The plan counts the chunked loss, and this model cannot have it.
            ValueError: Another number of blocks than planned.
        """
        inner = without_peft(model)
        levels = prepare_blocks(inner, self.levels, device=next(inner.parameters()).device)
        if self.job.loss == "full":
            return AppliedPlan([levels])
        try:
            return AppliedPlan([levels, chunk_loss(inner)])
        except BaseException:
            levels.remove()
            raise

    def __str__(self) -> str:
        lines = [str(self.plan)]
        if self.elsewhere:
            lines.append(_ELSEWHERE)
        if self.evaluation_batch < self.job.batch:
            lines.append(f"evaluate at most {self.evaluation_batch} sequences at once")
        return "\n".join(lines)


def plan(
    model: nn.Module | PretrainedConfig | str,
    *,
    batch_size: int,
    seq_len: int,
    budget: str | int | None = None,
    adapter: ProdialConfig | None = None,
    activations: str = AUTO,
    loss: str = AUTO,
    optimizer: str = "adamw",
    grad_accumulation: int = 1,
    dtype: torch.dtype | None = None,
) -> TrainingPlan:
    """Plan the memory of training an adapter in your own loop, in ``Trainer`` or in TRL.

    The sum is that of ``prodial finetune`` for steps launched one by one, with one addition: an
    evaluation is taken to hold whole logits. Nothing is loaded, and ``model`` stays as it is. On a
    machine without a GPU the plan is for one that has mamba-ssm's kernels.

    Args:
        model: A causal language model of transformers or mamba_ssm, adapted or plain; or its
            configuration, directory, hub id or ``"embedded"``.
        batch_size: Sequences in a forward pass.
        seq_len: Tokens of each.
        budget: What the whole process may take, such as ``"8GB"``, ``"8GiB"`` or bytes. None: what
            the GPU here has free, as far as it can be; without one, no limit.
        adapter: Of a plain model; None for ``ProdialConfig()``.
        activations: ``"auto"``, ``"keep"``, ``"recompute"`` or ``"checkpoint"``.
        loss: ``"chunked"`` (:func:`prodial_kernels.chunk_loss`, which ``apply`` puts in),
            ``"full"`` for whole logits, or ``"auto"``: chunked where the model's head allows it.
        optimizer: ``"adamw"``, ``"adamw8bit"`` or ``"paged_adamw8bit"``.
        grad_accumulation: Forward passes in an optimiser step.
        dtype: Computed in, which with autocast is not the weights'. None: the model's own; of one
            that is named, bfloat16.

    Raises:
        LossError: ``loss="chunked"``, and the model's head cannot be taken out.
        MemoryPlanError: The job does not fit into ``budget``, or its memory cannot be predicted on
            the GPU here because kernels are not installed.
        ModelError: There is no such model.
        ValueError: The adapter does not fit the model, or an argument is out of range.
    """
    here = torch.cuda.is_available()
    if here and not kernels_available():
        raise MemoryPlanError(f"the memory cannot be planned: {why_unknown(torch.device('cuda'))}")
    empty = _as_trained(model, adapter, dtype)
    compute = dtype or _dtype_of(empty)
    obstacle = head_obstacle(empty)
    if loss == "chunked" and obstacle is not None:
        raise LossError(f"loss 'chunked' cannot be planned: {obstacle}; use loss 'full'")
    if loss == AUTO:
        loss = "chunked" if obstacle is None else "full"
    fuse_norms(empty)
    shape = describe_model(empty, kernels=True)
    device = torch.device("cuda" if here else "cpu")
    job = Job(
        batch=batch_size,
        length=seq_len,
        itemsize=compute.itemsize,
        optimizer=optimizer,
        loss=loss,
        loss_rows=chunk_rows(shape.vocabulary, compute, torch.device("cuda")),
        accumulates=grad_accumulation > 1,
        whole_evaluation=True,
        limits=limits_of(device),
    )
    limit = None if budget is None else parse_budget(str(budget))
    constants = device_constants(device) if here else DeviceMemory()
    usable = usable_bytes(device, context=constants.context) if here else None
    bounds = [size for size in (limit, usable) if size is not None]
    made = plan_memory(
        shape, job, budget=min(bounds, default=None), activations=activations, device=constants,
        strict=limit is not None,
    )  # fmt: skip
    return TrainingPlan(made, job, elsewhere=not here)


def _as_trained(
    model: nn.Module | PretrainedConfig | str,
    adapter: ProdialConfig | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    """Return the model on ``meta`` with its adapter; ValueError where it has one of its own."""
    if isinstance(model, nn.Module):
        inner = without_peft(model)
        empty = on_meta(inner)
        if is_adapted(inner):
            if adapter is not None:
                raise ValueError("`adapter` is for plain models, and this one has an adapter")
            return empty
        if hasattr(model, "peft_config"):
            raise ValueError(
                "this model has adapters of PEFT and none of ProDiaL; the memory of those is not "
                "known"
            )
    elif isinstance(model, str):
        empty = empty_model(model, dtype=dtype or torch.bfloat16)
    else:
        empty = model_on_meta(model, dtype or torch.bfloat16).requires_grad_(False)
    apply_prodial(empty, adapter or ProdialConfig())
    return empty


def _dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the blocks' frozen weights."""
    frozen = (p for block in blocks_of(model) for p in block.parameters() if not p.requires_grad)
    return next((p.dtype for p in frozen if p.is_floating_point()), torch.float32)
