"""The predicted peak of PyTorch's allocator: the largest moment of a step, as a sum.

The moments: the loss, when every layer's activations are there; the backward of each layer, when
those of later layers are gone; the optimiser's step; an evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

from prodial_kernels._checks import COMPUTES, check_choice
from prodial_kernels.kernels.choices.tile_sizes import DeviceLimits
from prodial_kernels.models.layers.head import PART_ELEMENTS
from prodial_kernels.models.layers.recompute import CHECKPOINT
from prodial_kernels.quantization import FORMATS
from prodial_kernels.quantization.modules.counting import host_bytes, stored_bytes
from prodial_kernels.quantization.modules.routing import GROUP_BYTES
from prodial_kernels.quantization.modules.selection import EVERYTHING
from prodial_kernels.training.memory.activations import kept, sent, workspace
from prodial_kernels.training.memory.part_bytes import HOPPER, Tokens
from prodial_kernels.training.memory.shapes import MAMBA2, FrozenPart, ModelShape
from prodial_kernels.training.step.tuning import LEAST_TOKENS, TIMING_BYTES

# Bytes that an optimiser keeps of a trained element on the device; pages live on the host.
_STATES = {"adamw": 8.0, "adamw8bit": 2.0 + 8 / 256, "paged_adamw8bit": 0.0}
_FP32 = 4
# Of the same few kinds of layers, at the same few levels, in every plan that is tried.
_kept, _workspace = lru_cache(4096)(kept), lru_cache(4096)(workspace)


@dataclass(frozen=True)
class Job:
    """What is run.

    Attributes:
        batch: Sequences in a micro-batch.
        length: Tokens of each.
        itemsize: Bytes of an activation in the compute dtype: 2 or 4.
        quantize: ``"nf4"``, ``"int8"``, ``"fp8"``, None, or, to be planned, ``"auto"``.
        quantize_modules: What ``quantize`` stores: ``"projectors"`` or ``"all"``.
        experts: Where stored experts are: ``"device"``, ``"host"`` or, to be planned, ``"auto"``.
        optimizer: ``"adamw"``, ``"adamw8bit"`` or ``"paged_adamw8bit"``.
        loss: ``"full"`` (whole logits), ``"chunked"`` or ``"liger"``.
        loss_rows: Tokens whose logits exist at a time; of ``"chunked"`` only.
        graph: Whether steps are captured in a CUDA graph.
        accumulates: Whether several micro-batches make a step, so that gradients always exist.
        full: Whether every weight trains, in fp32, with 16-bit copies under autocast.
        whole_evaluation: Whether an evaluation holds whole logits, whatever the loss.
        compute: What frozen weights are multiplied in: ``"same"`` or ``"fp8"``.
        tunes: Whether upstream's kernels choose among configurations before the first step.
        limits: Of the device.
    """

    batch: int
    length: int
    itemsize: int = 2
    quantize: str | None = None
    quantize_modules: str = "projectors"
    experts: str = "device"
    optimizer: str = "adamw"
    loss: str = "chunked"
    loss_rows: int = 1024
    graph: bool = False
    accumulates: bool = False
    full: bool = False
    whole_evaluation: bool = False
    compute: str = "same"
    tunes: bool = False
    limits: DeviceLimits = HOPPER

    def __post_init__(self) -> None:
        for name, value, known in (
            ("quantize", self.quantize, (None, "auto", *FORMATS)),
            ("quantize_modules", self.quantize_modules, ("projectors", EVERYTHING)),
            ("experts", self.experts, ("auto", "device", "host")),
            ("optimizer", self.optimizer, tuple(_STATES)),
            ("loss", self.loss, ("full", "chunked", "liger")),
            ("compute", self.compute, COMPUTES),
        ):
            check_choice(name, value, known)
        for name in ("batch", "length", "itemsize", "loss_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def stores_everything(self) -> bool:
        """Whether all weights that can be stored are."""
        return self.quantize is not None and self.quantize_modules == EVERYTHING

    def tokens(self, batch: int, length: int) -> Tokens:
        """So many sequences of so many tokens, as what a block keeps is counted for."""
        return Tokens(
            batch, length, self.itemsize, self.quantize is not None, self.stores_everything,
            self.compute == "fp8", self.limits,
        )  # fmt: skip


@dataclass(frozen=True)
class PlanLine:
    """A line of the plan's table."""

    what: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Peak:
    """The largest moment.

    Attributes:
        moment: When it is, in words.
        rows: What it is the sum of.
        in_evaluation: Whether it is an evaluation's and not a training step's.
    """

    moment: str
    rows: tuple[PlanLine, ...]
    in_evaluation: bool = False

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(row.bytes for row in self.rows)


def peak_of(
    model: ModelShape,
    job: Job,
    levels: tuple[str, ...],
    *,
    evaluation_batch: int,
    library_workspace: int,
) -> Peak:
    """Return the largest moment of training and evaluation.

    Args:
        model: The model's shape.
        job: The job; ``quantize="auto"`` must have been decided.
        levels: For each layer, what of its activations is kept.
        evaluation_batch: Sequences evaluated at once.
        library_workspace: Bytes that cuBLAS keeps for a thread and stream.
    """
    if job.quantize == "auto":
        raise ValueError("quantize='auto' is decided by plan_memory")
    always = [*_weights(model, job), *_trained(model, job)]
    # Forward and backward run on threads of their own, and a graph on a stream of its own, beside
    # which an evaluation has had the usual one.
    handles = 3 if job.graph else 2
    always.append(
        PlanLine(
            "matrix library's workspace", handles * library_workspace, f"cuBLAS, {handles} of them"
        )
    )
    moments = _moments(model, job, levels, evaluation_batch)
    peaks = [
        Peak(moment, tuple(row for row in (*always, *rows) if row.bytes), evaluation)
        for moment, rows, evaluation in moments
    ]
    return max(peaks, key=lambda peak: peak.total)


def tuning_of(model: ModelShape, job: Job, peak: int, *, library_workspace: int) -> tuple[int, int]:
    """Return on how many tokens upstream's kernels choose, and the bytes that this takes.

    As many as a run has in a sequence, or as stay below its ``peak`` in bytes, but a chunk of the
    scan at the least. (0, 0) where they choose nothing.
    """
    layers = [layer for layer in model.layers if layer.mixer == MAMBA2]
    if not job.tunes or not layers:
        return 0, 0
    always = [*_weights(model, job), *_trained(model, job)]
    there = sum(line.bytes for line in always) + 2 * library_workspace
    length = job.length
    while True:
        tokens = job.tokens(1, length + model.inserted)
        most = max(_workspace(layer, tokens, CHECKPOINT) for layer in layers)
        total = there + most + TIMING_BYTES
        if total <= peak or length <= LEAST_TOKENS:
            return length, total
        length = max(LEAST_TOKENS, length // 2)


def _moments(
    model: ModelShape, job: Job, levels: tuple[str, ...], evaluation_batch: int
) -> Iterator[tuple[str, list[PlanLine], bool]]:
    tokens = job.tokens(job.batch, job.length + model.inserted)
    layers = list(zip(model.layers, levels, strict=True))
    until = list(accumulate(_kept(layer, tokens, level) for layer, level in layers))
    gradients = _FP32 * model.trained
    always_there = job.accumulates
    m, width = tokens.count, model.width
    # The last norm's input in fp32 and its output.
    head = (_FP32 + job.itemsize) * m * width
    # What the last block that sends its input out has sent.
    leaving = max((sent(layer, tokens, level) for layer, level in layers), default=0)
    yield (
        "when the loss is computed",
        [
            _activations(until[-1] + head + leaving, len(layers)),
            PlanLine("loss", _loss(model, job, m), _LOSSES[job.loss]),
            PlanLine("gradients", gradients if always_there else 0, "fp32"),
        ],
        False,
    )
    # In the backward of each layer; of these only the largest, since a plan asks for hundreds.
    there = [
        int(gradients * (1.0 if always_there else (len(layers) - index) / len(layers)))
        for index in range(len(layers))
    ]
    beside = [_workspace(layer, tokens, level) for layer, level in layers]
    totals = [sum(sizes) for sizes in zip(until, beside, there, strict=True)]
    index = totals.index(max(totals))
    yield (
        f"in the backward of layer {index + 1} of {len(layers)}",
        [
            _activations(until[index], index + 1),
            PlanLine(
                "largest temporaries",
                beside[index],
                "of that layer's backward, with what it computes again",
            ),
            PlanLine("gradients", there[index], "fp32"),
        ],
        False,
    )
    yield "in the optimiser's step", [PlanLine("gradients", gradients, "fp32")], False
    yield (
        "in an evaluation",
        [
            PlanLine(
                "evaluation",
                _evaluation(model, job, evaluation_batch),
                f"{evaluation_batch} sequences at once, no gradients",
            ),
        ],
        True,
    )


_LOSSES = {
    "full": "whole logits in fp32, their softmax and gradient",
    "chunked": "logits of one chunk of tokens at a time",
    "liger": "liger-kernel, logits of a few hundred tokens at a time",
}


def _activations(size: int, layers: int) -> PlanLine:
    return PlanLine("activations", size, f"kept by {layers} layers")


def _weights(model: ModelShape, job: Job) -> Iterator[PlanLine]:
    shape = ((1, model.vocabulary, model.width),)
    for name, size in (("embedding", model.embedding_bytes), ("head", model.head_bytes)):
        why = "and head, tied" if model.tied else ""
        if size and job.stores_everything and model.stores_ends:
            line = _line(name, FrozenPart(name, shape, size), job)
            yield replace(line, why=", ".join(filter(None, (why, line.why))))
        else:
            yield PlanLine(name, size, why)
    for part in model.parts:
        yield _line(f"frozen {part.kind}", part, job)
    yield PlanLine("other frozen weights", model.other_bytes, "dense")


def _line(name: str, part: FrozenPart, job: Job) -> PlanLine:
    """Frozen weights as the job has them."""
    if job.quantize is None or not (job.stores_everything or part.kind == "projectors"):
        return PlanLine(name, part.dense_bytes, "dense")
    size = sum(stored_bytes(job.quantize, n, k, number) for number, n, k in part.weights)
    if part.kind == "experts" and job.experts == "host":
        size = host_experts(job.quantize, part)[1]
        return PlanLine(name, size, f"stored in {job.quantize}, most of it in the host's memory")
    return PlanLine(name, size, f"stored in {job.quantize}")


def host_experts(format: str, part: FrozenPart) -> tuple[int, int]:
    """Return the bytes of experts in the host's memory, and what the device holds for them.

    The latter with two groups on their way, beside what is there all the time.
    """
    on_host = away = beside = 0
    for number, n, k in part.weights:
        whole, large = stored_bytes(format, n, k), host_bytes(format, n, k)
        on_host += number * large
        away += number * (whole - large)
        most = min(number, max(1, GROUP_BYTES // (2 * n * k)))
        beside = max(beside, 2 * most * large)
    return on_host, away + beside


def _trained(model: ModelShape, job: Job) -> Iterator[PlanLine]:
    what = "adapter" if model.adapted else "trained weights"
    yield PlanLine(what, model.trained_bytes, "fp32 masters")
    if job.full and job.itemsize < _FP32:
        yield PlanLine("16-bit copies of the weights", job.itemsize * model.trained, "autocast's")
    yield PlanLine("optimiser", int(_STATES[job.optimizer] * model.trained), job.optimizer)


def _loss(model: ModelShape, job: Job, m: int) -> int:
    vocabulary, c = model.vocabulary, job.itemsize
    hidden_gradient = c * m * model.width
    if job.loss == "full":
        # The logits, a copy without the last position, their softmax; later two gradients.
        return 3 * _FP32 * m * vocabulary
    if job.loss == "chunked":
        # Their softmax and gradient take the place of the logits. By a head that is stored, a part
        # of it, and the chunk's gradient, which parts are added to in fp32.
        rows, part = min(m, job.loss_rows), _head_part(model, job)
        sums = (_FP32 + c) * rows * model.width if part else 0
        return rows * vocabulary * c + part + sums + hidden_gradient
    return 2 * min(m, _liger_rows(m, model)) * vocabulary * c + hidden_gradient


def _head_part(model: ModelShape, job: Job) -> int:
    """Of a stored head, what is dense at a time."""
    if not (job.stores_everything and model.stores_ends):
        return 0
    return job.itemsize * min(PART_ELEMENTS, model.vocabulary * model.width)


def _liger_rows(m: int, model: ModelShape) -> int:
    """Tokens in a chunk of liger-kernel's fused linear cross-entropy."""
    chunks = -(-model.vocabulary // model.width)
    rows = -(-m // chunks)
    return 1 << (rows - 1).bit_length()


def _evaluation(model: ModelShape, job: Job, batch: int) -> int:
    m, c = batch * job.length, job.itemsize
    layer = max(model.layers, key=lambda layer: layer.projected + layer.inner)
    # A block by separate kernels, one after another.
    block = c * m * (2 * layer.projected + 3 * layer.inner) + 2 * _FP32 * m * layer.width
    if not layer.inner:
        block = 2 * c * m * max((n + k for n, k in layer.weights), default=0)
    if job.loss == "full" or job.whole_evaluation:
        logits = (c + _FP32) * m * model.vocabulary + _FP32 * job.length * model.vocabulary
    else:
        logits = min(m, job.loss_rows) * model.vocabulary * c + _head_part(model, job)
    return max(block, logits + c * m * model.width)
