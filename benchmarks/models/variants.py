"""What is measured on a whole model: the frozen one, adapted by this package, and by others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.models.methods import METHOD_VARIANTS, with_methods
from prodial_kernels import ProdialConfig, apply_prodial, quantize_model, remove_prodial

# The package on weights that are stored in fp8 and multiplied in it. The dense ones stay beside
# them for the other variants, so that its memory says nothing.
IN_FP8 = "prodial-fp8"
VARIANTS = ("frozen", "prodial", IN_FP8, "recompute", "lora", "lora-slow", "authors")
RANK = 16
# Of the mixer, by class: what leaves its fused function when it is False.
_SWITCHES = ("use_fast_path", "use_mem_eff_path")


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
    changes = {"frozen": _frozen, "authors": _authors, IN_FP8: _prodial_in_fp8}
    change = changes.get(variant, _prodial)
    if variant in METHOD_VARIANTS:
        change = with_methods
    with change(model, mixers, variant):
        yield


@contextmanager
def _frozen(model: nn.Module, mixers: Sequence[Any], variant: str) -> Iterator[None]:
    yield


@contextmanager
def _authors(model: nn.Module, mixers: Sequence[Any], variant: str) -> Iterator[None]:
    linears = [linear for mixer in mixers for linear in (mixer.in_proj, mixer.out_proj)]
    with _unfused(mixers):
        for linear in linears:
            parametrize.register_parametrization(
                linear, "weight", AuthorsWeight(linear.weight.detach())
            )
        try:
            yield
        finally:
            for linear in linears:
                parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
                linear.weight.requires_grad_(False)


@contextmanager
def _prodial(model: nn.Module, mixers: Sequence[Any], variant: str) -> Iterator[None]:
    options: dict[str, Any] = {}
    if variant == IN_FP8:
        options = {"compute": "fp8"}
    if variant.startswith("lora"):
        # LoRA alone in plain PyTorch.
        options = {"train_scale": False, "train_diagonal": False, "impl": "reference"}
    apply_prodial(model, ProdialConfig(r=RANK, **options))
    try:
        for name, parameter in model.named_parameters():
            if "prodial_" in name:
                # So that α B A is a tenth of W or less, as in fine-tuning.
                spread = 0.002 if name.endswith("prodial_b") else 0.02
                parameter.data.add_(spread * torch.randn_like(parameter))
        for mixer in mixers:
            mixer.prodial_recompute_xz = variant == "recompute"
        # In Mamba-2's block nothing but this package can adapt the fused projector.
        mamba2 = hasattr(mixers[0], "use_mem_eff_path")
        unfused = variant == "lora-slow" or (variant == "lora" and mamba2)
        with _unfused(mixers if unfused else ()):
            yield
    finally:
        for mixer in mixers:
            mixer.__dict__.pop("prodial_recompute_xz", None)
        remove_prodial(model)


@contextmanager
def _prodial_in_fp8(model: nn.Module, mixers: Sequence[Any], variant: str) -> Iterator[None]:
    dense = [
        (mixer, name, getattr(mixer, name)) for mixer in mixers for name in ("in_proj", "out_proj")
    ]
    quantize_model(model, "fp8")
    try:
        with _prodial(model, mixers, variant):
            yield
    finally:
        for mixer, name, linear in dense:
            setattr(mixer, name, linear)


@contextmanager
def _unfused(mixers: Sequence[Any]) -> Iterator[None]:
    """Upstream's path in which the projectors are modules that are called."""
    switches = [(mixer, name) for mixer in mixers for name in _SWITCHES if hasattr(mixer, name)]
    before = [getattr(mixer, name) for mixer, name in switches]
    for mixer, name in switches:
        setattr(mixer, name, False)
    try:
        yield
    finally:
        for (mixer, name), value in zip(switches, before, strict=True):
            setattr(mixer, name, value)
