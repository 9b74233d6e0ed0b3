"""The levels above one projector: one mixer block, and one whole training step.

transformers' models with random weights; adapters on in_proj and out_proj. Times are wall time
of eager steps, and beside it the time the device was busy: for small models the host decides.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn

from benchmarks.harness.memory import MIB, release
from benchmarks.harness.profiling import kernel_times
from benchmarks.harness.rows import Unavailable, ratio, reported
from benchmarks.harness.text import number, text_table
from benchmarks.harness.timing import Summary, synchronise
from benchmarks.projector.scaling import exponent
from benchmarks.projector.shapes import MODELS
from prodial_kernels import ProdialConfig, apply_prodial

METHODS = ("frozen", "prodial", "lora", "full")
FAMILIES = ("mamba-", "mamba2-")
# Without these, transformers' Mamba models run token by token in Python, or in plain PyTorch.
KERNELS = ("mamba_ssm", "causal_conv1d")


@dataclass(frozen=True)
class ModuleCase:
    """A model of :data:`benchmarks.projector.shapes.MODELS` at one batch size and length."""

    level: str
    model: str
    batch: int
    length: int
    dtype: str = "bfloat16"
    layers: int | None = None
    r: int = 16
    vocabulary: int = 50280

    @property
    def depth(self) -> int:
        """How many layers there are."""
        return 1 if self.level == "mixer" else self.layers or MODELS[self.model].layers

    @property
    def bytes(self) -> int:
        """About what its models and the activations of one step hold."""
        width, inner_and_gate = MODELS[self.model].in_proj
        weights = 2 * (3 * width * inner_and_gate * self.depth + self.vocabulary * width)
        activations = (
            self.batch * self.length * (12 * inner_and_gate * self.depth + 12 * self.vocabulary)
        )
        # Three models that are frozen but for adapters, and one with gradients and AdamW's moments.
        return 7 * weights + activations + (1 << 30)

    def tiny(self) -> ModuleCase:
        """The same on a CPU, in a moment."""
        layers = min(2, self.layers or 1)
        return replace(self, batch=1, length=8, dtype="float32", layers=layers, vocabulary=256)

    def __str__(self) -> str:
        layers = f", {self.layers} layers" if self.layers else ""
        return f"{self.level} {self.model} {self.batch}×{self.length} {self.dtype}{layers}"


@dataclass
class ModuleRow:
    """One method on one case; peak memory with weights and optimiser.

    Attributes:
        level, model, batch, length, dtype, layers, r, vocabulary: The :class:`ModuleCase`.
        depth: Number of layers.
        rival: One of :data:`METHODS`.
        both_us, busy_us: Wall time of an eager step, and the sum of its kernels.
    """

    level: str
    model: str
    batch: int
    length: int
    dtype: str
    layers: int | None
    r: int
    vocabulary: int
    depth: int
    rival: str
    status: str = ""
    peak_mib: float | None = None
    both_us: float | None = None
    spread: float | None = None
    busy_us: float | None = None
    ratio: float | None = None
    busy_ratio: float | None = None
    memory_ratio: float | None = None

    @classmethod
    def of(cls, case: ModuleCase, rival: str, status: str = "") -> ModuleRow:
        """A row of a case, without figures as yet."""
        return cls(**asdict(case), depth=case.depth, rival=rival, status=status)


CASES: Sequence[tuple[str, int, int]] = (
    ("mamba-130m", 4, 512), ("mamba-130m", 8, 2048), ("mamba2-130m", 4, 512),
)  # fmt: skip
# Beside the model's own number.
LAYERS = (1, 6, 12)


def module_cases(level: str, model: str | None, *, several: bool = True) -> list[ModuleCase]:
    """Return the cases of a level, or the first of them.

    Raises:
        ValueError: A model that is not a plain Mamba or Mamba-2.
    """
    _check_model(level, model)
    chosen = [(model, 4, 512), (model, 4, 2048)] if model else list(CASES)
    return [ModuleCase(level, *case) for case in (chosen if several else chosen[:1])]


def layer_cases(level: str, model: str | None) -> list[ModuleCase]:
    """Return one model at growing numbers of layers.

    Raises:
        ValueError: Layers of a single mixer, or a model that is not a plain Mamba or Mamba-2.
    """
    if level == "mixer":
        raise ValueError("scaling: a mixer has no layers to add; expected --level step")
    _check_model(level, model)
    name = model or CASES[0][0]
    return [ModuleCase(level, name, 4, 512, layers=n) for n in (*LAYERS, MODELS[name].layers)]


def _check_model(level: str, model: str | None) -> None:
    if model is not None and not model.startswith(FAMILIES):
        raise ValueError(f"model: --level {level} takes a mamba-… or mamba2-… model; got {model!r}")
    if model is not None and model not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}; got {model!r}")


def build(case: ModuleCase, device: str) -> nn.Module:
    """A causal language model with random weights; one layer of it for the level ``mixer``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = MODELS[case.model]
    width, _ = sizes.in_proj
    inner, _ = sizes.out_proj
    common = {"hidden_size": width, "num_hidden_layers": case.depth}
    common["vocab_size"] = case.vocabulary
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
    tokens = torch.randint(0, case.vocabulary, (case.batch, case.length), device=device)
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


@dataclass
class PreparedModules:
    """Models built and adapted, each of which has run two steps."""

    case: ModuleCase
    device: str
    rounds: int
    rows: dict[str, ModuleRow]
    steps: dict[str, Callable[[], None]] = field(default_factory=dict)

    def measure(self) -> list[ModuleRow]:
        """Time eager steps, interleaved, then how long the device was busy; a row each."""
        cuda = self.device.startswith("cuda")
        samples: dict[str, list[float]] = {method: [] for method in self.steps}
        for _ in range(self.rounds):
            for method, step in self.steps.items():
                synchronise(cuda)
                start = time.perf_counter()
                step()
                synchronise(cuda)
                samples[method].append((time.perf_counter() - start) * 1e6)
        for method, step in self.steps.items():
            row = self.rows[method]
            with reported(row):
                summary = Summary.of(samples[method])
                row.both_us, row.spread = summary.median, summary.spread
                row.busy_us = sum(kernel_times(step, self.device, repeats=2).values())
                row.status = "ok"
        floor = self.rows["frozen"]
        for row in self.rows.values():
            if row.status == floor.status == "ok":
                row.ratio = ratio(row.both_us, floor.both_us)
                row.busy_ratio = ratio(row.busy_us, floor.busy_us)
                row.memory_ratio = ratio(row.peak_mib, floor.peak_mib)
        return list(self.rows.values())


def prepare_modules(
    case: ModuleCase, methods: Sequence[str], device: str, rounds: int
) -> PreparedModules:
    """Build and adapt a model for each method, run it, and take its peak memory."""
    cuda = device.startswith("cuda")
    rows = {method: ModuleRow.of(case, method) for method in methods}
    prepared = PreparedModules(case, device, rounds, rows)
    for method, row in rows.items():
        release(device)
        with reported(row):
            absent = [name for name in KERNELS if importlib.util.find_spec(name) is None]
            if cuda and absent:
                raise Unavailable(
                    f"{' and '.join(absent)} not installed "
                    "(pip install '.[mamba]' --no-build-isolation)"
                )
            before = torch.cuda.memory_allocated() if cuda else 0
            step = make_step(case, method, device)
            step()
            step()
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                step()
                torch.cuda.synchronize()
                # With its weights and optimizer, without those of the methods built before it.
                row.peak_mib = (torch.cuda.max_memory_allocated() - before) / MIB
            prepared.steps[method] = step
    return prepared


def modules_table(rows: Sequence[ModuleRow]) -> str:
    """The rows of one case as a table; what could not be measured is said below."""
    lines = [
        [
            row.rival, number(row.both_us, 2, 1e-3), number(row.spread, 1, 50), number(row.ratio),
            number(row.busy_us, 2, 1e-3), number(row.busy_ratio), number(row.peak_mib, 0),
            number(row.memory_ratio),
        ]
        for row in rows
        if row.status == "ok"
    ]  # fmt: skip
    headers = [
        "method", "wall ms", "± %", "× frozen", "busy ms", "× frozen", "peak MiB", "× frozen",
    ]  # fmt: skip
    head = rows[0]
    title = f"{head.level} {head.model} {head.batch}×{head.length} {head.dtype}"
    title += f", {head.layers} layers" if head.layers else ""
    notes = [f"  {row.rival}: {row.status}" for row in rows if row.status != "ok"]
    return "\n".join([title, *([text_table(headers, lines)] if lines else []), *notes])


def grown(rows: Sequence[ModuleRow]) -> list[ModuleRow]:
    """The rows of whole steps that differ in nothing but their number of layers."""
    depths: dict[tuple[object, ...], set[int]] = {}

    def kind(row: ModuleRow) -> tuple[object, ...]:
        return row.level, row.model, row.batch, row.length, row.dtype

    for row in rows:
        depths.setdefault(kind(row), set()).add(row.depth)
    return [row for row in rows if len(depths[kind(row)]) > 1]


_GROWING = {"busy time": "busy_us", "wall time": "both_us", "memory": "peak_mib"}


def layers_table(rows: Sequence[ModuleRow]) -> str:
    """The exponents of device time and memory in the number of layers, by method."""
    rows = grown(rows)
    methods = dict.fromkeys(row.rival for row in rows)
    lines = []
    for label, figure in _GROWING.items():
        cells = []
        for method in methods:
            points = [
                (float(row.depth), float(getattr(row, figure)))
                for row in rows
                if row.rival == method and getattr(row, figure) is not None
            ]
            several = len({depth for depth, _ in points}) > 1
            cells.append(number(exponent(points)) if several else "–")
        lines.append([f"{label} in layers", *cells])
    return text_table(["exponent of", *methods], lines)


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
