"""The levels above one projector: one mixer block, and one whole training step.

transformers' models with random weights; adapters on in_proj and out_proj. Times are wall time
of eager steps, and beside it the time the device was busy: for small models the host decides.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.breakdown import kernel_times
from benchmarks.scaling import exponent
from benchmarks.shapes import MODELS
from benchmarks.timing import Summary, synchronise
from benchmarks.views import number, text_table
from prodial_kernels import ProdialConfig, apply_prodial

LEVELS = ("mixer", "step")
METHODS = ("frozen", "prodial", "lora", "full")
FAMILIES = ("mamba-", "mamba2-")


@dataclass(frozen=True)
class ModuleCase:
    """A model of :data:`benchmarks.shapes.MODELS` at one batch size and length."""

    level: str
    model: str
    batch: int
    length: int
    dtype: str = "bfloat16"
    layers: int | None = None
    r: int = 16

    def __str__(self) -> str:
        return f"{self.level} {self.model} {self.batch}×{self.length} {self.dtype}"


CASES: Sequence[tuple[str, int, int]] = (
    ("mamba-130m", 4, 512),
    ("mamba-130m", 8, 2048),
    ("mamba2-130m", 4, 512),
)


LAYERS = (6, 12, 24, 48)


def module_cases(
    level: str, model: str | None, *, quick: bool = False, scaling: bool = False
) -> list[ModuleCase]:
    """Return the cases of a level, or with ``scaling`` one model at growing numbers of layers.

    Raises:
        ValueError: A model that is not a plain Mamba or Mamba-2, or layers of a single mixer.
    """
    if model is not None and not model.startswith(FAMILIES):
        raise ValueError(f"model: --level {level} takes a mamba-… or mamba2-… model; got {model!r}")
    if model is not None and model not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}; got {model!r}")
    if scaling and level == "mixer":
        raise ValueError("scaling: a mixer has no layers to add; expected --level step")
    if scaling:
        return [ModuleCase(level, model or "mamba-130m", 4, 512, layers=n) for n in LAYERS]
    chosen = [(model, 4, 512), (model, 4, 2048)] if model else list(CASES)
    return [ModuleCase(level, *case) for case in (chosen[:1] if quick else chosen)]


def layers_view(rows: Sequence[dict[str, Any]]) -> str:
    """The exponents of device time and memory in the number of layers, by method."""
    methods = dict.fromkeys(row["rival"] for row in rows)
    lines = []
    for label, figure in (
        ("busy time", "busy_us"),
        ("wall time", "both_us"),
        ("memory", "peak_mib"),
    ):
        cells = []
        for method in methods:
            points = [
                (float(row["layers"]), float(row[figure]))
                for row in rows
                if row["rival"] == method and row[figure] is not None
            ]
            cells.append(number(exponent(points)) if len(points) > 1 else "–")
        lines.append([f"{label} in layers", *cells])
    return text_table(["exponent of", *methods], lines)


def build(case: ModuleCase, device: str) -> nn.Module:
    """A causal language model with random weights; one layer of it for the level ``mixer``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = MODELS[case.model]
    width, _ = sizes.in_proj
    inner, _ = sizes.out_proj
    layers = 1 if case.level == "mixer" else case.layers or sizes.layers
    common = {"hidden_size": width, "num_hidden_layers": layers, "vocab_size": 50280}
    if case.model.startswith("mamba2-"):
        kind = "mamba2"
        options = {"num_heads": inner // 64, "head_dim": 64, "state_size": 128, "n_groups": 1}
    else:
        kind, options = "mamba", {"state_size": 16}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **common, **options, use_cache=False)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, case.dtype)
        )
    return model.train()


def adapt(model: nn.Module, method: str, r: int) -> list[nn.Parameter]:
    """Make ``model`` train by a method; return what trains.

    ``"lora"`` is this package with only its LoRA part. PEFT's LoRA is not measured here: on the
    fused path of these models its adapter on ``out_proj`` is not called.
    """
    model.requires_grad_(method == "full")
    configs = {
        "prodial": ProdialConfig(r=r),
        "lora": ProdialConfig(r=r, train_diagonal=False, train_scale=False),
    }
    if method in configs:
        apply_prodial(model, configs[method])
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_step(case: ModuleCase, method: str, device: str) -> Callable[[], None]:
    """Build and adapt a model and return one step of it on random data.

    The frozen floor runs forward and backward down to its input, and updates nothing.
    """
    model = build(case, device)
    trained = adapt(model, method, case.r)
    if case.level == "mixer":
        return _mixer_step(case, model, device)
    tokens = torch.randint(0, 50280, (case.batch, case.length), device=device)
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    optimizer = None
    if trained:
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.startswith("cuda"))
    if not trained:
        embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_())

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        _check_gradients(trained)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def measure_modules(
    case: ModuleCase, methods: Sequence[str], device: str, rounds: int
) -> list[dict[str, Any]]:
    """Return a row for each method, interleaved; the floor first."""
    cuda = device.startswith("cuda")
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], None]] = {}
    for method in ("frozen", *(name for name in methods if name != "frozen")):
        gc.collect()
        before = torch.cuda.memory_allocated() if cuda else 0
        steps[method] = step = make_step(case, method, device)
        step()
        step()
        peak = None
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            # With its weights and optimizer, without those of the methods built before it.
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        busy = kernel_times(step, device, repeats=2)
        rows[method] = {
            **asdict(case), "rival": method, "status": "ok", "peak_mib": peak,
            "busy_us": sum(busy.values()), "kernels_us": dict(list(busy.items())[:12]),
        }  # fmt: skip
    samples: dict[str, list[float]] = {method: [] for method in steps}
    for _ in range(rounds):
        for method, step in steps.items():
            synchronise(cuda)
            start = time.perf_counter()
            step()
            synchronise(cuda)
            samples[method].append((time.perf_counter() - start) * 1e6)
    floor = Summary.of(samples["frozen"]).median
    for method, row in rows.items():
        summary = Summary.of(samples[method])
        row |= {
            "both_us": summary.median,
            "spread": summary.spread,
            "ratio": summary.median / floor,
        }
        row["busy_ratio"] = row["busy_us"] / rows["frozen"]["busy_us"]
        if cuda:
            row["memory_ratio"] = row["peak_mib"] / rows["frozen"]["peak_mib"]
    return list(rows.values())


def modules_view(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of one case as a table."""
    lines = [
        [
            row["rival"], number(row["both_us"] / 1e3, 2), number(100 * row["spread"] / 2, 1),
            number(row["ratio"]), number(row["busy_us"] / 1e3, 2), number(row["busy_ratio"]),
            number(row["peak_mib"], 0), number(row.get("memory_ratio")),
        ]
        for row in rows
    ]  # fmt: skip
    headers = [
        "method",
        "wall ms",
        "± %",
        "× frozen",
        "busy ms",
        "× frozen",
        "peak MiB",
        "× frozen",
    ]
    head = rows[0]
    title = f"{head['level']} {head['model']} {head['batch']}×{head['length']} {head['dtype']}"
    title += f", {head['layers']} layers" if head["layers"] else ""
    return f"{title}\n{text_table(headers, lines)}"


def _mixer_step(case: ModuleCase, model: nn.Module, device: str) -> Callable[[], None]:
    block: nn.Module = model.backbone.layers[0].mixer  # type: ignore[union-attr, index]
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    width = MODELS[case.model].in_proj[0]
    dtype = getattr(torch, case.dtype)
    x = torch.randn(case.batch, case.length, width, device=device).to(dtype).requires_grad_()
    grad_output: Tensor = torch.randn_like(x)

    def step() -> None:
        output = block(x)
        output = output[0] if isinstance(output, tuple) else output
        output.backward(grad_output)
        _check_gradients(trained)
        x.grad = None
        for parameter in trained:
            parameter.grad = None

    return step


def _check_gradients(trained: Sequence[nn.Parameter]) -> None:
    """No figure for an adapter that a model's fast path does not call."""
    missed = sum(parameter.grad is None for parameter in trained)
    if missed:
        raise RuntimeError(f"{missed} of {len(trained)} trained parameters received no gradient")
