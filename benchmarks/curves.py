"""Loss curves with and without each saving: what a saving changes beyond the order of sums.

The same model, data, seed and steps, each variant in turn, against the plain run: whole logits,
eager steps, everything kept, the dense base. ``control`` is the plain run with each batch cut in
two micro-batches: the same sums in another order, so its deviation is the noise to compare with.
NF4 is another base model, and its gap is reported, not judged.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.finetune_jobs import MODELS, recompute_in_segments
from prodial_kernels import ProdialConfig, apply_prodial, quantize_model
from prodial_kernels.training.buckets import Buckets
from prodial_kernels.training.graphed import GraphedStep
from prodial_kernels.training.loop import LoopOptions, learning_rate
from prodial_kernels.training.loss import make_loss
from prodial_kernels.training.model import load_model
from prodial_kernels.training.optimizers import make_optimizer
from prodial_kernels.training.packing import PackedBatches
from prodial_kernels.training.parameter_groups import adapter_parameter_groups
from prodial_kernels.training.step import EagerStep, TrainingStep

# A saving may deviate so many times as much as another order of the same sums does.
NOISE_FACTOR = 4.0
LENGTH, BATCH = 256, 4


@dataclass(frozen=True)
class Variant:
    """One way to take the same steps."""

    name: str
    loss: str = "full"
    graphed: bool = False
    recompute_xz: bool = False
    segment: int = 0
    base: str = "dense"
    parts: int = 1


PLAIN = Variant("plain")
VARIANTS = (
    Variant("control", parts=2),
    Variant("chunked loss", loss="chunked"),
    Variant("graph", graphed=True),
    Variant("recompute_xz", recompute_xz=True),
    Variant("checkpointing", segment=2),
    Variant("all of these", "chunked", True, True, 2),
    Variant("nf4", base="nf4"),
)


def embedded(device: str) -> tuple[nn.Module, Tensor]:
    """The package's own pretrained Mamba-2, and a text that it was not trained on."""
    loaded = load_model("embedded", device=torch.device(device), dtype=_dtype(device))
    return loaded.model, text_tokens()


def random_130m(device: str) -> tuple[nn.Module, Tensor]:
    """A random Mamba of 130M parameters (on a CPU a tiny one), and the same text."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = MODELS["mamba-130m" if device == "cuda" else "tiny"]
    config = AutoConfig.for_model(
        "mamba", hidden_size=sizes.width, num_hidden_layers=sizes.layers, state_size=16,
        vocab_size=50280 if device == "cuda" else 4096, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=_dtype(device))
    return model, text_tokens()


MAKERS: dict[str, Callable[[str], tuple[nn.Module, Tensor]]] = {
    "embedded": embedded,
    "random-130m": random_130m,
}


@cache
def text_tokens() -> Tensor:
    """The source of Python's own modules as one stream of the embedded model's tokens."""
    from transformers import AutoTokenizer

    from prodial_kernels.embedded import embedded_model_path
    from prodial_kernels.training.data import load_documents

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    documents = load_documents("stdlib", max_bytes=1_000_000).train
    ids = [i for text in documents for i in tokenizer(str(text))["input_ids"]]
    return torch.tensor(ids, dtype=torch.int32)


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def losses_of(maker: str, variant: Variant, device: str, steps: int) -> list[float]:
    """Train ``steps`` steps and return their losses."""
    model, tokens = MAKERS[maker](device)
    if variant.base != "dense":
        quantize_model(model, variant.base)
    torch.manual_seed(0)
    apply_prodial(model, ProdialConfig(r=16))
    for module in model.modules():
        if hasattr(module, "in_proj") and variant.recompute_xz:
            module.prodial_recompute_xz = True  # type: ignore[assignment]
    if variant.segment:
        recompute_in_segments(model, variant.segment)
    model.train()
    batches = PackedBatches(tokens, seq_len=LENGTH, batch_size=BATCH // variant.parts)
    step = _step(model, variant, device)
    options = LoopOptions(steps=steps, lr=3e-3, warmup=10)
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


def _step(model: nn.Module, variant: Variant, device: str) -> TrainingStep:
    groups = adapter_parameter_groups(model, weight_decay=0.01)
    optimizer = make_optimizer("adamw", groups, lr=3e-3, device=torch.device(device))
    loss, _ = make_loss(model, variant.loss, graphed=variant.graphed)
    if not variant.graphed:
        return EagerStep(loss, optimizer, clip=1.0)
    from prodial_kernels.training.cuda_graphs import CudaGraphs

    graphs = CudaGraphs(torch.device(device))
    return GraphedStep(loss, optimizer, Buckets(BATCH, LENGTH), graphs, clip=1.0, required=True)


def run_curves(
    device: str, steps: int, names: Sequence[str] | None = None
) -> tuple[list[dict[str, Any]], bool]:
    """Compare every variant with the plain run on each model; print as it goes.

    Args:
        device: ``"cuda"``, or ``"cpu"`` to try it out.
        steps: Of every run.
        names: Keys of :data:`MAKERS`; None for all.

    Returns:
        A row for each model and variant, and whether every saving of the dense base stays within
        :data:`NOISE_FACTOR` times the control's deviation.
    """
    rows: list[dict[str, Any]] = []
    good = True
    for maker in names or MAKERS:
        plain = losses_of(maker, PLAIN, device, steps)
        rows.append({"model": maker, "variant": PLAIN.name, "losses": plain})
        print(f"{maker}: {steps} steps, loss {plain[0]:.4f} -> {plain[-1]:.4f}", flush=True)
        noise = 0.0
        for variant in VARIANTS:
            if variant.graphed and device != "cuda":
                continue
            gc.collect()
            losses = losses_of(maker, variant, device, steps)
            apart = [abs(a - b) for a, b in zip(losses, plain, strict=True)]
            largest, final = max(apart), losses[-1] - plain[-1]
            if variant.name == "control":
                # At least a rounding of the loss itself.
                noise = max(largest, 1e-6 * max(plain))
            judged = variant.base == "dense" and variant.name != "control"
            kept = not judged or largest <= NOISE_FACTOR * noise
            good &= kept
            rows.append(
                {"model": maker, "variant": variant.name, "losses": losses, "largest": largest,
                 "mean": sum(apart) / steps, "final": final, "noise": noise, "ok": kept}
            )  # fmt: skip
            print(
                f"  {variant.name:14} largest deviation {largest:.2e} nats "
                f"({largest / noise:5.2f} × control), at the end {final:+.2e}"
                f"{'' if not judged else '  ok' if kept else '  MISSED'}",
                flush=True,
            )
    return rows, good
