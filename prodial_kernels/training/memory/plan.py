"""The memory plan: how a fine-tuning job fits into a budget, and what its peak will be.

A pure function of numbers: :func:`plan_memory` takes a model's shape, the job and the device's
constants, and returns which layers keep what, whether weights are quantised, and the predicted
peak with the sum it is made of. It touches no device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from prodial_kernels._checks import check_choice
from prodial_kernels.models.layers.recompute import (
    CHECKPOINT,
    KEEP,
    LEVEL_TEXTS,
    LEVELS,
    OFFLOAD,
)
from prodial_kernels.training.config import ACTIVATIONS
from prodial_kernels.training.memory.activations import levels_of, sent
from prodial_kernels.training.memory.part_bytes import Tokens
from prodial_kernels.training.memory.peak import (
    Job,
    Peak,
    PlanLine,
    host_experts,
    peak_of,
    tuning_of,
)
from prodial_kernels.training.memory.shapes import ModelShape
from prodial_kernels.training.sizes import size_text

AUTO = "auto"

HOST_BYTES_A_SECOND = 20e9
"""What a device is taken to exchange with page-locked memory: PCIe 4 with 16 lanes."""


class MemoryPlanError(ValueError):
    """The job does not fit into its budget; the message says what would."""


@dataclass(frozen=True)
class DeviceMemory:
    """What a device takes besides tensors.

    Attributes:
        context: Bytes outside PyTorch's allocator: the CUDA context, loaded kernels and graphs. An
            allowance (819 MiB measured on an H100, with a graph of 64 layers); what it really was
            is reported after a run.
        library_workspace: Bytes that PyTorch gives cuBLAS for each thread and stream that it
            multiplies on (32 MiB from Hopper on).
        fragmentation: Share of the allocated peak to leave free for gaps between tensors (up to 6%
            measured).
    """

    context: int = 832 * 2**20
    library_workspace: int = 32 * 2**20
    fragmentation: float = 0.06


@dataclass(frozen=True)
class MemoryPlan:
    """How a job is run, and what it will take.

    Attributes:
        levels: For each layer, what of its activations is kept (see ``memory_activations``).
        quantize: Storage format of the frozen projectors; None for dense.
        evaluation_batch: Sequences that fit at once in an evaluation.
        peak: The predicted peak of PyTorch's allocator.
        context: Bytes outside the allocator, as assumed.
        reserve: Bytes left free for gaps between tensors.
        budget: What was to be fitted into; None for no limit.
        sent: Bytes that go to the host's memory in a step, and come back.
        experts: Where stored experts are, ``"device"`` or ``"host"``.
        streamed: Bytes of experts in the host's memory.
        tuning: Bytes of PyTorch's tensors while upstream's kernels choose among configurations,
            before the first step; 0 where they choose nothing.
        tuning_tokens: On how many tokens they do.
    """

    levels: tuple[str, ...]
    quantize: str | None
    evaluation_batch: int
    peak: Peak
    context: int
    reserve: int
    budget: int | None
    sent: int = 0
    experts: str = "device"
    streamed: int = 0
    tuning: int = 0
    tuning_tokens: int = 0

    @property
    def total(self) -> int:
        """The predicted peak with the CUDA context, without the reserve."""
        return self.peak.total + self.context

    @property
    def needed(self) -> int:
        """The least budget: the predicted peak and the reserve, or what tuning takes before."""
        return max(self.total + self.reserve, self.tuning + self.context)

    @property
    def fits(self) -> bool:
        """Whether everything and the reserve are within the budget."""
        return self.budget is None or self.needed <= self.budget

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready values."""
        return {
            "levels": dict(Counter(self.levels)),
            "quantize": self.quantize,
            "evaluation_batch": self.evaluation_batch,
            "moment": self.peak.moment,
            "rows": [asdict(row) for row in self.peak.rows],
            "allocated": self.peak.total,
            "context": self.context,
            "reserve": self.reserve,
            "budget": self.budget,
            "sent": self.sent,
            "experts": self.experts,
            "streamed": self.streamed,
            "tuning": self.tuning,
            "tuning_tokens": self.tuning_tokens,
        }

    def __str__(self) -> str:
        rows = [
            *self.peak.rows,
            PlanLine("PyTorch's tensors at the peak", self.peak.total, self.peak.moment),
            PlanLine("CUDA context and kernels", self.context, "outside PyTorch; an allowance"),
            PlanLine("predicted peak", self.total, ""),
            PlanLine("left for gaps between tensors", self.reserve, "not part of the prediction"),
        ]
        if self.tuning:
            why = f"before the first step, on {self.tuning_tokens} tokens; outside the prediction"
            rows.append(PlanLine("while upstream's kernels tune", self.tuning, why))
        if self.sent:
            ms = 1e3 * self.sent / HOST_BYTES_A_SECOND
            why = f"each step and back, {ms:.0f} ms each way beside the blocks"
            rows.append(PlanLine("in the host's memory meanwhile", self.sent, why))
        if self.streamed:
            ms = 1e3 * self.streamed / HOST_BYTES_A_SECOND
            why = f"those taken come in each pass: up to {ms:.0f} ms, two or three times a step"
            rows.append(PlanLine("experts in the host's memory", self.streamed, why))
        if self.budget is not None:
            rows.append(PlanLine("memory budget", self.budget, "" if self.fits else "NOT ENOUGH"))
        width = max(len(row.what) for row in rows)
        sizes = [size_text(row.bytes) for row in rows]
        wide = max(map(len, sizes))
        table = [
            f"{row.what.ljust(width)}  {size.rjust(wide)}  {row.why}".rstrip()
            for row, size in zip(rows, sizes, strict=True)
        ]
        return "\n".join([f"memory plan: {describe_levels(self.levels)}", *table])


def plan_memory(
    model: ModelShape,
    job: Job,
    *,
    budget: int | None,
    activations: str = AUTO,
    device: DeviceMemory | None = None,
    strict: bool = True,
) -> MemoryPlan:
    """Choose the fastest way to run a job within a budget.

    In order: everything kept; the norms computed again; in_proj's output too; one residual a
    layer; that residual in the host's memory. A level is used for as many layers as needed, the
    first ones, whose activations live longest. ``"offload"`` within a strict budget leaves out the
    last but one of these: what does not fit waits in the host's memory, and what there is room for
    is kept on the device as the levels before have it. With ``job.quantize="auto"`` the weights are
    stored in NF4 only if none of this is enough.

    Args:
        model: What :func:`~prodial_kernels.training.memory.shapes.describe_model` returns.
        job: The job.
        budget: Bytes in all, the CUDA context included; None for no limit.
        activations: ``"auto"``, or one level for all layers: ``"keep"``, ``"recompute"``,
            ``"checkpoint"`` or ``"offload"``.
        device: Constants of the device.
        strict: Raise where nothing fits, rather than return the smallest plan.

    Raises:
        MemoryPlanError: Nothing fits; the message says what would, with numbers.
        ValueError: An unknown ``activations``.
    """
    check_choice("activations", activations, ACTIVATIONS)
    device = device or DeviceMemory()
    smallest = None
    filled = strict and budget is not None
    for plan in _candidates(model, job, budget, activations, device, filled):
        if plan.fits:
            return plan
        if smallest is None or plan.needed < smallest.needed:
            smallest = plan
    if smallest is None:
        raise ValueError("the model has no layers")
    if not strict:
        return smallest
    advice = what_would_fit(model, job, budget=budget or 0, activations=activations, device=device)
    raise MemoryPlanError(
        f"the job does not fit into the memory budget of {size_text(budget or 0)}: it would take "
        f"{size_text(smallest.needed)} at the least. {advice}"
    )


def what_would_fit(
    model: ModelShape,
    job: Job,
    *,
    budget: int,
    activations: str = AUTO,
    device: DeviceMemory | None = None,
) -> str:
    """Return a sentence that names changes with which a job fits into a budget, with numbers.

    Of each kind of change the smallest one that is enough.
    """
    device = device or DeviceMemory()
    kinds = [*_changes(job), *_pairs_of_changes(job)]
    tried = [(kind, activations) for kind in kinds]
    if activations not in (AUTO, CHECKPOINT):
        tried.insert(0, ([("activations 'auto'", job)], AUTO))
    found = []
    for alternatives, level in tried:
        for change, other in alternatives:
            plan = plan_memory(
                model, other, budget=budget, activations=level, device=device, strict=False
            )
            if plan.fits:
                found.append(f"{change} ({size_text(plan.needed)})")
                break
    if found:
        return f"What fits: {'; or '.join(found[:4])}"
    least = plan_memory(model, job, budget=budget, activations=AUTO, device=device, strict=False)
    return (
        "No change of the options is enough; with them as they are it takes a budget of "
        f"{size_text(least.needed)}, with one residual kept for each layer"
    )


def level_plans(
    model: ModelShape, activations: str, *, filled: bool = False
) -> Iterator[tuple[str, ...]]:
    """Yield levels for all layers, from the fastest to the smallest.

    ``filled``: a budget is to be filled, so that ``"offload"`` is for the layers that need it.
    """
    available = [levels_of(layer) for layer in model.layers]
    if activations == OFFLOAD and filled:
        # Beside the layers' own work it takes no longer than a checkpoint on the device.
        available = [
            tuple(level for level in own if level != CHECKPOINT or OFFLOAD not in own)
            for own in available
        ]
    elif activations != AUTO:
        # Of each layer's levels the smallest that is not beyond the one wanted.
        allowed = LEVELS[: LEVELS.index(activations) + 1]
        yield tuple([own for own in levels if own in allowed][-1] for levels in available)
        return
    current = tuple(KEEP for _ in available)
    yield current
    for level in LEVELS[1:]:
        concerned = [i for i, levels in enumerate(available) if level in levels]
        chosen = list(current)
        for index in concerned:
            chosen[index] = level
            yield tuple(chosen)
        current = tuple(chosen)


def describe_levels(levels: Sequence[str]) -> str:
    """Return which layers do what, in words."""
    if len(set(levels)) == 1:
        return f"all {len(levels)} layers {LEVEL_TEXTS[levels[0]]}"
    counts = Counter(levels)
    parts = [f"{counts[level]} layers {LEVEL_TEXTS[level]}" for level in LEVELS if counts[level]]
    return "; ".join(parts)


def _candidates(
    model: ModelShape, job: Job, budget: int | None, activations: str, device: DeviceMemory,
    filled: bool,
) -> Iterator[MemoryPlan]:  # fmt: skip
    formats = (None, "nf4") if job.quantize == AUTO else (job.quantize,)
    for quantize in formats:
        for experts in ("device", "host") if job.experts == AUTO else (job.experts,):
            decided = replace(job, quantize=quantize, experts=experts)
            if experts == "host" and job.experts == AUTO and not _streamed(model, decided):
                continue
            for levels in level_plans(model, activations, filled=filled):
                yield _plan(model, decided, levels, budget, device)


def _plan(
    model: ModelShape, job: Job, levels: tuple[str, ...], budget: int | None, device: DeviceMemory
) -> MemoryPlan:
    batch = job.batch
    while True:
        peak = peak_of(
            model, job, levels,
            evaluation_batch=batch, library_workspace=device.library_workspace,
        )  # fmt: skip
        tokens, tuning = tuning_of(
            model, job, peak.total, library_workspace=device.library_workspace
        )
        plan = MemoryPlan(
            levels, job.quantize, batch, peak, device.context,
            int(device.fragmentation * peak.total), budget, _sent(model, job, levels),
            job.experts, _streamed(model, job), tuning, tokens,
        )  # fmt: skip
        # Evaluating fewer sequences at once costs nothing worth another level.
        if plan.fits or batch == 1 or not peak.in_evaluation:
            return plan
        batch = max(1, batch // 2)


def _streamed(model: ModelShape, job: Job) -> int:
    """Bytes of experts that are in the host's memory."""
    if job.quantize is None or not job.stores_everything or job.experts != "host":
        return 0
    experts = (part for part in model.parts if part.kind == "experts")
    return sum(host_experts(job.quantize, part)[0] for part in experts)


def _sent(model: ModelShape, job: Job, levels: tuple[str, ...]) -> int:
    tokens = Tokens(job.batch, job.length + model.inserted, job.itemsize)
    return sum(
        sent(layer, tokens, level) for layer, level in zip(model.layers, levels, strict=True)
    )


_Alternatives = list[tuple[str, Job]]


def _changes(job: Job) -> list[_Alternatives]:
    """Return kinds of changes; of each, (what to do, the job with it), the least first."""
    kinds: list[_Alternatives] = []
    if job.loss == "full":
        kinds.append([("loss 'chunked'", replace(job, loss="chunked"))])
    if job.optimizer == "adamw":
        kinds.append([("optimizer 'adamw8bit'", replace(job, optimizer="adamw8bit"))])
    if job.quantize is None and not job.full:
        kinds.append([("quantize 'nf4'", replace(job, quantize="nf4"))])
    return [*kinds, _smaller_batches(job), _shorter_sequences(job)]


def _pairs_of_changes(job: Job) -> list[_Alternatives]:
    if job.quantize is not None or job.full:
        return [
            [
                (f"{first} and {second}", shorter)
                for first, smaller in _smaller_batches(job)[-1:]
                for second, shorter in _shorter_sequences(smaller)
            ]
        ]
    quantized = replace(job, quantize="nf4")
    return [
        [(f"quantize 'nf4' and {change}", other) for change, other in kind]
        for kind in (_smaller_batches(quantized), _shorter_sequences(quantized))
    ]


def _smaller_batches(job: Job) -> _Alternatives:
    found = []
    for batch in range(job.batch - 1, 0, -1):
        change = f"batch_size {batch}"
        if job.batch % batch == 0:
            change += f" with {job.batch // batch} times the grad_accumulation"
        found.append((change, replace(job, batch=batch)))
    return found


def _shorter_sequences(job: Job) -> _Alternatives:
    lengths = (job.length // 2, job.length // 4, job.length // 8)
    return [
        (f"seq_len {length}", replace(job, length=length)) for length in lengths if length >= 16
    ]
