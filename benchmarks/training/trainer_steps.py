"""Whole models of transformers in its ``Trainer``: how they are adapted, and one measured run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness.memory import MIB, release
from benchmarks.harness.profiling import kernels_in
from benchmarks.harness.rows import Unavailable
from benchmarks.models import upstream
from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.models.mixers.hf import unfused_forward
from prodial_kernels.models.patch_point import AdaptedMixer

RANK = 16
VARIANTS = ("frozen", "prodial", "captured", "lora-fused", "lora-unfused")
# Names of the configuration's class and its options.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba-130m": (
        "Mamba", {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24}
    ),
    "mamba2-130m": (
        "Mamba2",
        {
            "vocab_size": 50288, "hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24,
            "head_dim": 64, "n_groups": 1, "state_size": 128, "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip
TINY_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba-130m": (
        "Mamba", {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    ),
    "mamba2-130m": (
        "Mamba2",
        {
            "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4,
            "head_dim": 8, "n_groups": 1, "state_size": 4, "chunk_size": 4,
            "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How a variant is measured.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        warm_up: Steps before the first that counts; captured blocks take three of them.
        steps: Steps that count.
        configurations: Among how many upstream's Mamba-2 kernels choose; 0 for all.
        tiny: Tiny models.
    """

    device: str = "cuda"
    warm_up: int = 6
    steps: int = 20
    configurations: int = 2
    tiny: bool = False


def measure(
    name: str,
    batch: int,
    length: int,
    variant: str,
    settings: Settings,
    around: Profiler | None = None,
) -> dict[str, float]:
    """Train one variant for a few steps in a fresh ``Trainer``.

    Returns:
        ``ms``: wall time of a step. ``allocated_mib``: the allocator's peak. ``peak_mib``: that and
        what a graph's pool has beside it. ``reserved_mib``: what was taken from the device.
    """
    if variant == "captured" and settings.device != "cuda":
        raise Unavailable("CUDA graphs need a CUDA device")
    with ExitStack() as stack:
        model, callbacks = build(name, variant, settings)
        for callback in callbacks:
            stack.callback(getattr(callback, "release", lambda: None))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="prodial-trainer-"))
        watch = _watch(settings, around)
        trainer = _trainer(model, batch, length, settings, [*callbacks, watch], Path(folder))
        trainer.train()
        figures: dict[str, float] = watch.figures
    del model, trainer, watch, callbacks
    release(settings.device, workspaces=True)
    return figures


def build(name: str, variant: str, settings: Settings) -> tuple[nn.Module, Sequence[Any]]:
    """Return a model with random weights in bf16, adapted, and callbacks for the trainer."""
    import transformers

    if settings.device == "cuda":
        upstream.load(settings.configurations)
    prefix, options = (TINY_CONFIGS if settings.tiny else CONFIGS)[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**options)
    with torch.device(settings.device):
        model: Any = getattr(transformers, f"{prefix}ForCausalLM")(config)
    model.to(torch.bfloat16).requires_grad_(False)
    if variant == "frozen":
        # The trainer wants something to train; the gradient goes through every block all the same.
        model.backbone.norm_f.weight.requires_grad_(True)
        model.enable_input_require_grads()
        return model, ()
    if variant == "lora-fused":
        return _lora_fused(model), ()
    if variant == "lora-unfused":
        return _lora_unfused(model), ()
    apply_prodial(model, ProdialConfig(r=RANK))
    if variant == "prodial":
        return model, ()
    from prodial_kernels.captured.callback import CaptureCallback

    return model, (CaptureCallback(),)


def _lora_fused(model: Any) -> nn.Module:
    """LoRA where PEFT and the fused path let it: on what is called."""
    peft = _peft()
    mixer = model.backbone.layers[0].mixer
    targets = [target for target in ("in_proj", "x_proj") if hasattr(mixer, target)]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def _lora_unfused(model: Any) -> nn.Module:
    """LoRA on both projectors, as it can be had: injected past PEFT's refusal of ``out_proj``.

    Mixers run the separate kernels that evaluation takes, or ``out_proj`` would get no gradient.
    """
    peft = _peft()
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["in_proj", "out_proj"])
    # The blocks carry no model type, by which PEFT would know them.
    peft.inject_adapter_in_model(config, model.backbone.layers)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = parameter.data.float()
    for block in model.backbone.layers:
        AdaptedMixer(block.mixer, {"forward": unfused_forward})
    adapted: nn.Module = model
    return adapted


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise Unavailable(f"{error} (pip install peft)") from None
    return peft


def _trainer(
    model: nn.Module,
    batch: int,
    length: int,
    settings: Settings,
    callbacks: Sequence[Any],
    folder: Path,
) -> Any:
    from transformers import Trainer, TrainingArguments

    total = settings.warm_up + settings.steps
    config: Any = model.config
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(1, config.vocab_size, (total * batch, length), generator=drawn)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch, max_steps=total,
        learning_rate=1e-4, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True, use_cpu=settings.device == "cpu",
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks))


def _watch(settings: Settings, around: Profiler | None = None) -> Any:
    """A callback that takes the time and the memory of the steps that count."""
    from transformers import TrainerCallback

    cuda = settings.device == "cuda"

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.figures: dict[str, float] = {}
            self._started = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step = state.global_step
            if step == settings.warm_up - 2 and cuda:
                # What warming up has left is not of the steps that count.
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            if step == settings.warm_up:
                _wait(cuda)
                if around is not None:
                    around.start()
                self._started = time.perf_counter()
            if step == settings.warm_up + settings.steps:
                _wait(cuda)
                seconds = time.perf_counter() - self._started
                if around is not None:
                    around.stop(settings.steps, seconds)
                self.figures = {"ms": 1000 * seconds / settings.steps, **_memory(cuda)}

    return Watch()


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def _memory(cuda: bool) -> dict[str, float]:
    if not cuda:
        return {}
    # The allocator counts as free what graphs use in their pools.
    hidden = sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
    )
    return {
        "allocated_mib": torch.cuda.max_memory_allocated() / MIB,
        "peak_mib": (torch.cuda.max_memory_allocated() + hidden) / MIB,
        "pool_free_mib": hidden / MIB,
        "reserved_mib": torch.cuda.max_memory_reserved() / MIB,
    }


class Profiler:
    """Where the time of the steps that count goes: the host's by function, the device's in all."""

    def __init__(self, *, device: bool) -> None:
        """Make it; ``device`` also sums the kernels, which makes the host slower."""
        import cProfile

        self.text = ""
        self._host = None if device else cProfile.Profile()
        self._device: Any = None
        if device:
            kinds = [torch.profiler.ProfilerActivity.CUDA]
            self._device = torch.profiler.profile(activities=kinds)

    def start(self) -> None:
        """The first step that counts begins."""
        if self._host is not None:
            self._host.enable()
        else:
            self._device.start()

    def stop(self, steps: int, seconds: float, top: int = 25) -> None:
        """The last one has ended."""
        wall = f"{1000 * seconds / steps:.2f} ms a step"
        if self._host is not None:
            import io
            import pstats

            self._host.disable()
            out = io.StringIO()
            for order in ("tottime", "cumtime"):
                pstats.Stats(self._host, stream=out).sort_stats(order).print_stats(top)
            self.text = f"host, {steps} steps, {wall} while it is profiled\n{out.getvalue()}"
            return
        self._device.stop()
        kernels = kernels_in(self._device, steps, cuda=True)
        total = sum(kernel.us for kernel in kernels) / 1000
        lines = [
            f"{kernel.us / 1000:8.3f} ms {kernel.count:7.1f} x  {kernel.name[:90]}"
            for kernel in kernels[:top]
        ]
        self.text = "\n".join([f"device, {total:.2f} ms of kernels in {wall}", *lines])


def profiled(name: str, batch: int, length: int, variant: str, settings: Settings) -> str:
    """Where a variant's steps take their time."""
    kinds = [False, True] if settings.device == "cuda" else [False]
    profilers = [Profiler(device=kind) for kind in kinds]
    for profiler in profilers:
        measure(name, batch, length, variant, settings, profiler)
    return "\n".join(profiler.text for profiler in profilers)
