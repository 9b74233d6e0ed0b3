"""Whole mamba_ssm models, adapted, against their own frozen fast path.

``python -m benchmarks.mixers --output FILE`` measures backbone forward and backward of
``MambaLMHeadModel`` with random weights of the published sizes, in bf16, with r = 16 adapters on
``in_proj`` and ``out_proj``: GPU time by CUDA-graph replay, and the allocator's peak with the
weights. ``frozen`` is the floor: the fast path as mamba_ssm ships it, nothing trained. Both need
the gradient towards the embedded tokens, so that every layer has a backward.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prodial_kernels import ProdialConfig, apply_prodial, remove_prodial

# d_model, layers, class of the mixer.
MODELS = {
    "mamba-130m": (768, 24, "Mamba1"),
    "mamba-1.4b": (2048, 48, "Mamba1"),
    "mamba2-130m": (768, 24, "Mamba2"),
    "mamba2-1.3b": (2048, 48, "Mamba2"),
}
# (model, batch, length): what time and memory must not exceed, as multiples of the floor.
MUST = {
    ("mamba-130m", 4, 512): (1.25, 1.10),
    ("mamba-130m", 8, 2048): (1.20, 1.10),
    ("mamba-1.4b", 4, 512): (1.15, 1.10),
    ("mamba-1.4b", 4, 2048): (1.15, 1.10),
    ("mamba2-130m", 4, 512): (1.25, 1.10),
    ("mamba2-130m", 4, 2048): (1.20, 1.10),
    ("mamba2-1.3b", 4, 512): (1.15, 1.10),
    ("mamba2-1.3b", 4, 2048): (1.15, 1.10),
}
DEFAULT_MODELS = ("mamba-130m", "mamba-1.4b")
VARIANTS = ("frozen", "prodial", "recompute", "lora", "authors")
DEFAULT_VARIANTS = ("frozen", "prodial", "recompute", "lora")
RANK = 16


@dataclass(frozen=True)
class Row:
    """One variant of one model at one shape; ratios are to ``frozen`` of the same shape."""

    model: str
    batch: int
    length: int
    variant: str
    ms: float
    mib: float
    time_ratio: float
    memory_ratio: float

    @property
    def must(self) -> tuple[float, float] | None:
        """Largest allowed ratios of time and memory; None for a rival."""
        limits = MUST.get((self.model, self.batch, self.length))
        return limits if self.variant == "prodial" else None

    @property
    def ok(self) -> bool:
        """Whether the ratios are within ``must``."""
        must = self.must
        return must is None or (self.time_ratio <= must[0] and self.memory_ratio <= must[1])

    def __str__(self) -> str:
        verdict = ""
        if self.must is not None:
            verdict = (
                f"must {self.must[0]:.2f}x {self.must[1]:.2f}x  {'ok' if self.ok else 'MISSED'}"
            )
        shape = f"{self.batch}x{self.length}"
        return (
            f"{self.model:12} {shape:>7} {self.variant:>9} {self.ms:9.2f} ms {self.mib:9,.0f} MiB  "
            f"{self.time_ratio:5.2f}x {self.memory_ratio:5.2f}x  {verdict}"
        ).rstrip()


class AuthorsWeight(nn.Module):
    """W' as the authors' code forms it in every forward: dense products with diag(s) and D_b."""

    def __init__(self, weight: Tensor) -> None:
        """Start a little way into training, with 1×1 blocks."""
        super().__init__()
        rows, columns = weight.shape
        self.blocks = nn.Parameter(weight.new_zeros(columns, 1, 1, dtype=torch.float32))
        self.scale = nn.Parameter(weight.new_ones(rows, dtype=torch.float32))
        self.lora_a = nn.Parameter(torch.randn_like(weight[:RANK], dtype=torch.float32) * 0.02)
        self.lora_b = nn.Parameter(weight.new_zeros(rows, RANK, dtype=torch.float32))

    def forward(self, weight: Tensor) -> Tensor:
        """[N, K] -> [N, K]."""
        d_a = torch.block_diag(*self.blocks).to(weight.dtype)
        identity = torch.eye(d_a.shape[0], device=weight.device, dtype=weight.dtype)
        d_b = d_a * (1 - identity) + identity - torch.relu(d_a * identity)
        dense = torch.diag(self.scale.to(weight.dtype)) @ weight @ d_b
        return dense + (self.lora_b @ self.lora_a).to(weight.dtype)


@contextmanager
def adapted(model: nn.Module, variant: str) -> Iterator[None]:
    """Turn the frozen ``model`` into a variant, and back afterwards."""
    mixers: list[Any] = [module for module in model.modules() if hasattr(module, "out_proj")]
    if variant == "frozen":
        yield
    elif variant == "authors":
        switch = "use_fast_path" if hasattr(mixers[0], "use_fast_path") else "use_mem_eff_path"
        for mixer in mixers:
            setattr(mixer, switch, False)
            for linear in (mixer.in_proj, mixer.out_proj):
                parametrize.register_parametrization(
                    linear, "weight", AuthorsWeight(linear.weight.detach())
                )
        yield
        for mixer in mixers:
            setattr(mixer, switch, True)
            for linear in (mixer.in_proj, mixer.out_proj):
                parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
                linear.weight.requires_grad_(False)
    else:
        options: dict[str, Any] = {}
        if variant == "lora":
            # LoRA alone in plain PyTorch: in the same block for Mamba-1, unfused for Mamba-2.
            options = {"train_scale": False, "train_diagonal": False, "impl": "reference"}
            for mixer in mixers:
                mixer.use_mem_eff_path = False
        apply_prodial(model, ProdialConfig(r=RANK, **options))
        for name, parameter in model.named_parameters():
            if "prodial_" in name:
                # So that α B A is a tenth of W or less, as in fine-tuning.
                spread = 0.002 if name.endswith("prodial_b") else 0.02
                parameter.data.add_(spread * torch.randn_like(parameter))
        for mixer in mixers:
            mixer.prodial_recompute_xz = variant == "recompute"
        yield
        for mixer in mixers:
            mixer.use_mem_eff_path = True
            del mixer.prodial_recompute_xz
        remove_prodial(model)


def build(name: str) -> nn.Module:
    """Return a frozen model with random weights on the GPU, in bf16, in training mode."""
    # Kernels that Mamba-2 tunes are tuned once per machine.
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    from mamba_ssm import MambaLMHeadModel
    from mamba_ssm.models.config_mamba import MambaConfig

    width, depth, layer = MODELS[name]
    torch.manual_seed(0)
    config = MambaConfig(d_model=width, n_layer=depth, ssm_cfg={"layer": layer})
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
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    release()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**20
    release()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
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


def release() -> None:
    """Return what nothing refers to any more to the device, cuBLAS's workspaces among it.

    cuBLAS keeps one of 32 MiB for every stream it has seen; what ran before would count otherwise.
    """
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def measure_model(
    name: str, shapes: Sequence[tuple[int, int]], variants: Sequence[str]
) -> Iterator[Row]:
    """Yield a row per shape and variant, the floor of each shape first."""
    model = build(name)
    for batch, length in shapes:
        floor: tuple[float, float] | None = None
        for variant in variants:
            with adapted(model, variant):
                ms, mib = measure(make_step(model, batch, length))
                for parameter in model.parameters():
                    parameter.grad = None
            release()
            floor = floor or (ms, mib)
            yield Row(name, batch, length, variant, ms, mib, ms / floor[0], mib / floor[1])


def kernel_times(step: Callable[[], None]) -> dict[str, tuple[float, int]]:
    """Return (ms, calls) of every kernel of one step."""
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return {
        event.key: (event.self_device_time_total / 1000, event.count)
        for event in profiler.key_averages()
        if event.self_device_time_total > 0
    }


def print_profile(name: str, batch: int, length: int, top: int = 40) -> None:
    """Print the kernels of one adapted step beside those of the frozen one, by time."""
    model = build(name)
    found: dict[str, dict[str, tuple[float, int]]] = {}
    for variant in ("prodial", "frozen"):
        with adapted(model, variant):
            found[variant] = kernel_times(make_step(model, batch, length))
        release()
    totals = {variant: sum(ms for ms, _ in times.values()) for variant, times in found.items()}
    print(f"{name} {batch}x{length}: ms (calls) of prodial, of frozen")
    print("  " + "  ".join(f"{total:8.3f} (   -)" for total in totals.values()) + "  all kernels")
    names = {kernel for times in found.values() for kernel in times}

    def largest(kernel: str) -> float:
        return -max(times.get(kernel, (0.0, 0))[0] for times in found.values())

    for kernel in sorted(names, key=largest)[:top]:
        cells = [found[v].get(kernel, (0.0, 0)) for v in ("prodial", "frozen")]
        columns = "  ".join(f"{ms:8.3f} ({calls:4d})" for ms, calls in cells)
        print(f"  {columns}  {kernel[:110]}")


def shapes_of(name: str, wanted: Sequence[str] | None) -> list[tuple[int, int]]:
    """Return the (batch, length) that are measured for a model."""
    known = [(batch, length) for model, batch, length in MUST if model == name]
    if not wanted:
        return known
    return [(int(batch), int(length)) for batch, length in (w.split("x") for w in wanted)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, write it as JSON; return 1 if a row misses what it must keep."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixers", description=__doc__)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(DEFAULT_MODELS))
    parser.add_argument("--shapes", nargs="+", metavar="BxL", help="for example 4x512")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS[1:], default=list(DEFAULT_VARIANTS[1:]),
        help="beside frozen; authors takes seconds a step",
    )  # fmt: skip
    parser.add_argument(
        "--profile", action="store_true", help="print kernel times of a step instead"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.mixers: needs a CUDA device, found none", file=sys.stderr)
        return 2
    rows: list[Row] = []
    for name in options.models:
        shapes = shapes_of(name, options.shapes)
        if options.profile:
            for batch, length in shapes:
                print_profile(name, batch, length)
                release()
            continue
        for row in measure_model(name, shapes, ["frozen", *options.variants]):
            rows.append(row)
            print(row, flush=True)
        release()
    if options.output and rows:
        command = " ".join(["python -m benchmarks.mixers", *(arguments or sys.argv[1:])])
        write(rows, options.output, command)
    return 0 if all(row.ok for row in rows) else 1


def write(rows: Sequence[Row], path: Path, command: str) -> None:
    """Write the rows with what they were measured on."""
    from benchmarks.environment import describe

    record = {
        **describe("cuda" if torch.cuda.is_available() else "cpu", command),
        "rows": [{**asdict(row), "must": row.must, "ok": row.ok} for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
