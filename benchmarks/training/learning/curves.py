"""Loss curves with and without each saving: what a saving changes beyond the order of sums.

The same model, data, seed and steps, each variant in turn, against the plain run: whole logits,
eager steps, everything kept, the dense base. ``control`` is the plain run with each batch cut in
two micro-batches: the same sums in another order, so its deviation is the noise to compare with. On
average over the steps: in bf16 the loss of a single step can jump, in any of the runs.
Savings other than liger's loss, which no graph can hold, are taken in captured steps: these launch
the same kernels in a fraction of the time, and ``graph`` says what capturing alone changes. NF4 is
another base model, and its gap is reported, not judged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from multiprocessing import get_context
from statistics import fmean

import torch
from torch import Tensor, nn

from benchmarks.harness.memory import release
from benchmarks.training.sizes import transformers_config
from prodial_kernels import quantize_model
from prodial_kernels.models.layers.fused_norms import fuse_norms
from prodial_kernels.models.layers.recompute import apply_levels
from prodial_kernels.models.loading.load import load_model
from prodial_kernels.training.config import FinetuneConfig, ResolvedConfig
from prodial_kernels.training.data.batches import BatchSizes
from prodial_kernels.training.data.packing import PackedBatches
from prodial_kernels.training.memory.run_plan import block_levels
from prodial_kernels.training.method import prepare_method
from prodial_kernels.training.run.loop import LoopOptions, learning_rate
from prodial_kernels.training.step.choose import decide, facts_of, make_step

# A saving may deviate so many times as much as another order of the same sums does.
NOISE_FACTOR = 2.0
# On a CPU, which only tries it out, the scan goes token by token.
LENGTH = {"cuda": 256, "cpu": 16}
BATCH, LR = 4, 3e-3


@dataclass(frozen=True)
class Variant:
    """One way to take the same steps.

    Attributes:
        name: As printed.
        loss: As ``prodial finetune`` has it, like the next two.
        activations: Of every layer, or what comes closest to it.
        base: ``"dense"``, or a format of quantisation.
        norms: Run each norm as one kernel.
        graphed: Capture the steps, on a GPU.
        parts: Micro-batches that a batch is cut into.
    """

    name: str
    loss: str = "full"
    activations: str = "keep"
    base: str = "dense"
    norms: bool = False
    graphed: bool = True
    parts: int = 1


@dataclass
class CurveRow:
    """The losses of one variant beside the plain run's, in nats; or the ``error`` it failed with.

    Attributes:
        mean, largest: Of the absolute deviations over the steps.
        shift: Of the mean loss.
        noise: The control's mean deviation.
        ok: Whether it is within :data:`NOISE_FACTOR` times that, where it is judged.
    """

    model: str
    variant: str
    losses: list[float] | None = None
    mean: float | None = None
    largest: float | None = None
    shift: float | None = None
    noise: float | None = None
    error: str | None = None
    ok: bool = True


PLAIN = Variant("plain", graphed=False)
CONTROL = Variant("control", graphed=False, parts=2)
GRAPH = Variant("graph")
LIGER = Variant("liger loss", "liger", graphed=False)
VARIANTS = (
    CONTROL,
    GRAPH,
    LIGER,
    Variant("chunked loss", "chunked"),
    Variant("recompute", activations="recompute"),
    Variant("checkpoint", activations="checkpoint"),
    Variant("fused norms", norms=True),
    Variant("all of a run", "chunked", "checkpoint", norms=True),
    Variant("nf4", base="nf4"),
)


def variants_on(device: str) -> list[Variant]:
    """Those that there are on a device: a CPU has neither graphs nor liger-kernel."""
    if device != "cuda":
        return [replace(v, graphed=False) for v in VARIANTS if v not in (GRAPH, LIGER)]
    return [v for v in VARIANTS if v is not LIGER or find_spec("liger_kernel") is not None]


def embedded(device: str) -> tuple[nn.Module, Tensor]:
    """The package's own pretrained Mamba-2, and a text that it was not trained on."""
    loaded = load_model("embedded", device=torch.device(device), dtype=_dtype(device))
    return loaded.model, text_tokens()


def random_130m(device: str) -> tuple[nn.Module, Tensor]:
    """A random Mamba of 130M parameters (on a CPU a tiny one), and the same text."""
    from transformers import AutoModelForCausalLM

    config = transformers_config("mamba-130m" if device == "cuda" else "tiny")
    # The text's tokens are the embedded model's.
    config.vocab_size = max(4096, config.vocab_size)
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=_dtype(device))
    return model, text_tokens()


MAKERS: dict[str, Callable[[str], tuple[nn.Module, Tensor]]] = {
    "random-130m": random_130m,
    "embedded": embedded,
}


@cache
def text_tokens(side: str = "train") -> Tensor:
    """The source of Python's own modules as one stream of the embedded model's tokens.

    ``side``: ``"train"`` or ``"held_out"``.
    """
    from transformers import AutoTokenizer

    from prodial_kernels.embedded import embedded_model_path
    from prodial_kernels.training.data.splits import load_documents

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    documents = getattr(load_documents("stdlib", max_bytes=1_000_000), side)
    ids = [i for text in documents for i in tokenizer(str(text))["input_ids"]]
    return torch.tensor(ids, dtype=torch.int32)


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


# Once per process: each run trains a copy of the model.
@cache
def made(maker: str, device: str) -> tuple[nn.Module, Tensor]:
    """The model of one of :data:`MAKERS`, and its text."""
    return MAKERS[maker](device)


def losses_of(maker: str, variant: Variant, device: str, steps: int) -> list[float]:
    """Train ``steps`` steps and return their losses."""
    release(device, workspaces=True)
    model, tokens = made(maker, device)
    model = copy.deepcopy(model)
    if variant.base != "dense":
        quantize_model(model, variant.base)
    torch.manual_seed(0)
    config = config_of(variant, LENGTH[device])
    optimizer = prepare_method(model, config).optimizer
    # Each by itself; a run fuses its norms whatever its blocks keep.
    if variant.norms:
        fuse_norms(model)
    levels = block_levels(model, config.chosen_activations)
    if levels is not None:
        apply_levels(model, levels)
    model.train()
    batches = PackedBatches(tokens, BatchSizes(config.seq_len, BATCH // variant.parts))
    choice = decide(config, facts_of(model), torch.device(device))
    step = make_step(model, optimizer, config, choice, device=torch.device(device))
    options = LoopOptions(steps=steps, lr=LR, warmup=config.warmup)
    losses = []
    for number in range(steps):
        first = number * variant.parts
        step.begin(
            [batches.batch(first + i) for i in range(variant.parts)],
            learning_rate(options, number),
        )
        losses.append(step.finish().loss)
    step.close()
    return losses


def config_of(variant: Variant, length: int) -> ResolvedConfig:
    """What ``prodial finetune`` would be told, as far as a step depends on it."""
    return FinetuneConfig(
        r=16, lr=LR, batch_size=BATCH // variant.parts, seq_len=length,
        grad_accumulation=variant.parts, activations=variant.activations, loss=variant.loss,
        cuda_graph="on" if variant.graphed else "off",
    ).resolved()  # fmt: skip


@contextmanager
def submitting(workers: int) -> Iterator[Callable[..., Callable[[], list[float]]]]:
    """Yield what takes :func:`losses_of`'s arguments and returns what waits for its losses.

    Args:
        workers: Processes to run in, all at once, as most of a step the device is idle; 0 for this
            one, each run when it is waited for.
    """
    if workers == 0:
        yield lambda *arguments: partial(losses_of, *arguments)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        yield lambda *arguments: pool.submit(losses_of, *arguments).result
    finally:
        pool.shutdown(cancel_futures=True)


def run_curves(
    device: str, steps: int, names: Sequence[str] | None = None, *, workers: int = 0
) -> tuple[list[CurveRow], bool]:
    """Compare every variant with the plain run on each model; print as it goes.

    Args:
        device: ``"cuda"``, or ``"cpu"`` to try it out.
        steps: Of every run.
        names: Keys of :data:`MAKERS`; None for all.
        workers: As for :func:`submitting`.

    Returns:
        A row for each model and variant, and whether every saving of the dense base stays within
        :data:`NOISE_FACTOR` times the control's deviation.
    """
    rows: list[CurveRow] = []
    with submitting(workers) as submit:
        runs = {
            maker: {
                variant: submit(maker, variant, device, steps)
                for variant in (PLAIN, *variants_on(device))
            }
            for maker in names or MAKERS
        }
        for maker, waiting in runs.items():
            rows += compare(maker, waiting)
    return rows, all(row.ok for row in rows)


def compare(model: str, waiting: Mapping[Variant, Callable[[], list[float]]]) -> Iterator[CurveRow]:
    """Yield and print a row for each variant; without the plain run or the control no more."""
    plain: list[float] = []
    noise = 0.0
    for variant, wait in waiting.items():
        row = CurveRow(model, variant.name)
        try:
            losses = wait()
        # One that fails is a row, and the others are compared all the same.
        except Exception as error:
            row.error, row.ok = f"{type(error).__name__}: {error}", False
            print(f"  {model} {variant.name:14} FAILED: {row.error}", flush=True)
            yield row
            if variant in (PLAIN, CONTROL):
                return
            continue
        row.losses = losses
        if variant == PLAIN:
            plain = losses
            text = f"{model}: {len(plain)} steps, loss {plain[0]:.4f} -> {plain[-1]:.4f}"
            print(text, flush=True)
            yield row
            continue
        deviations = [abs(a - b) for a, b in zip(losses, plain, strict=True)]
        row.mean, row.largest = fmean(deviations), max(deviations)
        row.shift = fmean(losses) - fmean(plain)
        if variant == CONTROL:
            # At least a rounding of the loss itself.
            noise = max(row.mean, 1e-6 * max(plain))
        row.noise = noise
        judged = variant.base == "dense" and variant != CONTROL
        row.ok = not judged or row.mean <= NOISE_FACTOR * noise
        print(
            f"  {variant.name:14} deviation {row.mean:.2e} nats on average "
            f"({row.mean / noise:5.2f} × control), {row.largest:.2e} at most; all in all "
            f"{row.shift:+.2e}{'' if not judged else '  ok' if row.ok else '  MISSED'}",
            flush=True,
        )
        yield row
