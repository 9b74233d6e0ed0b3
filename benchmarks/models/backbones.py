"""Whole mamba_ssm models with random weights, and what a worker does with them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import nn

from benchmarks.harness.memory import MIB, release
from benchmarks.harness.rows import Unavailable, ratio, reported
from benchmarks.harness.timing import warm_up
from benchmarks.models.rows import ModelRow
from benchmarks.models.upstream import limit_configurations, one_configuration
from benchmarks.models.variants import adapted
from benchmarks.projector.shapes import MODELS

BACKBONES = ("mamba-130m", "mamba-1.4b", "mamba2-130m", "mamba2-1.3b")
"""Those of :data:`benchmarks.projector.shapes.MODELS` that are measured."""
_COMPILE_NOTHING = ("lora", "lora-slow", "authors")


@dataclass(frozen=True)
class ModelCase:
    """A model at one batch size and length."""

    model: str
    batch: int
    length: int

    @property
    def bytes(self) -> int:
        """About the peak of one step."""
        sizes = MODELS[self.model]
        weights = 2 * (6 * sizes.width**2 * sizes.layers + 50280 * sizes.width)
        tokens = self.batch * self.length
        return 2 * weights + 20 * tokens * sizes.width * sizes.layers + (1 << 30)

    @property
    def mamba2(self) -> bool:
        """Whether its mixers are Mamba-2's."""
        return self.model.startswith("mamba2-")

    def __str__(self) -> str:
        return f"{self.model} {self.batch}×{self.length}"


@dataclass(frozen=True)
class ModelJob:
    """One model at one shape, in a process of its own, variant by variant; the floor first."""

    case: ModelCase
    variants: tuple[str, ...]
    configurations: int = 0

    def __str__(self) -> str:
        return f"{self.case}: {', '.join(self.variants)}"

    @property
    def seconds(self) -> float:
        """About how long measuring takes."""
        return 5.0 + 3.0 * len(self.variants)

    @property
    def bytes(self) -> int:
        """What others that prepare side by side leave free."""
        return self.case.bytes

    def prepare(self, device: str, alone: AbstractContextManager[object]) -> PreparedModel:
        """Build the model and run what compiles."""
        model = build(self.case.model, self.configurations)
        prepared = PreparedModel(self.case, model, self.variants)
        for variant in self.variants:
            if variant not in _COMPILE_NOTHING:
                # What upstream tunes when it first runs should find the device quiet.
                quiet = alone if variant == "frozen" else nullcontext()
                # What fails here fails again where it is measured, and gets its row there.
                with quiet, reported(), adapted(model, variant):
                    make_step(model, self.case.batch, self.case.length)()
                clear(model)
        return prepared

    def rows(self, status: str) -> list[ModelRow]:
        """A row for each variant that says why there are no figures."""
        return [ModelRow(**asdict(self.case), variant=v, status=status) for v in self.variants]


@dataclass(frozen=True)
class TuneJob:
    """Compile one of the configurations that each of upstream's kernels chooses among.

    Upstream tunes when a kernel first runs, compiling one configuration after another, which takes
    minutes. Done in many processes beforehand, each finds them all on disk.
    """

    case: ModelCase
    number: int
    configurations: int = 0
    seconds: float = 0.1
    bytes: int = 1 << 29

    def __str__(self) -> str:
        return f"tuning of {self.case.model}, configuration {self.number}"

    def prepare(self, device: str, alone: AbstractContextManager[object]) -> PreparedModel:
        """Run one layer forward and backward with nothing to choose."""
        model = build(self.case.model, self.configurations, layers=1)
        # One that does not fit the device is left to the tuning, which knows what to do.
        with one_configuration(self.number), reported():
            make_step(model, self.case.batch, self.case.length)()
        return PreparedModel(self.case, model, ())

    def rows(self, status: str) -> list[ModelRow]:
        """It has none."""
        return []


@dataclass
class PreparedModel:
    """A frozen model on the device."""

    case: ModelCase
    model: nn.Module
    variants: Sequence[str]

    def measure(self) -> list[ModelRow]:
        """Return a row for each variant; ratios are to the first, ``frozen``."""
        rows = [ModelRow(**asdict(self.case), variant=variant) for variant in self.variants]
        for row in rows:
            with reported(row):
                with adapted(self.model, row.variant):
                    row.ms, row.mib = measure(make_step(self.model, row.batch, row.length))
                row.status = "ok"
            clear(self.model)
        for row in rows:
            if row.status == rows[0].status == "ok":
                row.time_ratio = ratio(row.ms, rows[0].ms)
                row.memory_ratio = ratio(row.mib, rows[0].mib)
        return rows


def build(name: str, configurations: int = 0, layers: int | None = None) -> nn.Module:
    """Return a frozen model with random weights on the GPU, in bf16, in training mode.

    Args:
        name: One of :data:`BACKBONES`.
        configurations: See :func:`limit_configurations`; 0 leaves upstream's.
        layers: Instead of the model's own number.

    Raises:
        Unavailable: mamba_ssm cannot be imported.
    """
    try:
        from mamba_ssm import MambaLMHeadModel
        from mamba_ssm.models.config_mamba import MambaConfig
    except ImportError as error:
        raise Unavailable(f"{error} (pip install '.[mamba]' --no-build-isolation)") from None

    limit_configurations(configurations)
    sizes = MODELS[name]
    layer = "Mamba2" if name.startswith("mamba2-") else "Mamba1"
    torch.manual_seed(0)
    config = MambaConfig(
        d_model=sizes.width, n_layer=layers or sizes.layers, ssm_cfg={"layer": layer}
    )
    model: nn.Module = MambaLMHeadModel(config, device="cuda", dtype=torch.bfloat16)
    embedding = model.get_submodule("backbone.embedding")
    # Something below every layer that asks for a gradient, also where nothing trains.
    embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return model.requires_grad_(False).train()


def make_step(model: nn.Module, batch: int, length: int) -> Callable[[], None]:
    """Return one forward and backward of the backbone; gradients are overwritten each time."""
    ids = torch.randint(0, 50277, (batch, length), device="cuda")
    backbone = model.get_submodule("backbone")
    width = next(iter(backbone.parameters())).shape[1]  # of the embedding
    grad = torch.randn(batch, length, width, device="cuda").bfloat16()

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        backbone(ids).backward(grad)

    return step


def measure(step: Callable[[], None], rounds: int = 5) -> tuple[float, float]:
    """Return GPU time of one step in ms and the allocator's peak in MiB."""
    warm_up([step, step])
    torch.cuda.synchronize()
    release("cuda", workspaces=True)
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / MIB
    release("cuda", workspaces=True)
    graph = torch.cuda.CUDAGraph()
    # The outer one, as a recording that fails leaves its stream the current one.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        step()
    graph.replay()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), peak


def clear(model: nn.Module) -> None:
    """Drop gradients, and what the last variant left."""
    for parameter in model.parameters():
        parameter.grad = None
    release("cuda", workspaces=True)
