"""ProDiaL and what it has as special cases: LoRA, diagonals, and Figure 4's variants of T."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.quality.methods.budgets import fit, projectors
from benchmarks.quality.methods.method import ADAPTER_RATES, VECTOR_RATES, Method, Unfit
from prodial_kernels import ProdialConfig, ProdialLinear, apply_prodial

__all__ = ["METHODS"]

BOTH = ("in_proj", "out_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_SSM = ("A_log", "D", "dt_bias", "conv1d")


def _prodial(
    targets: tuple[str, ...] = BOTH,
    *,
    diagonal: str = "relu",
    scale: bool = True,
    blocks: str | None = "one",
    alpha: Callable[[int], float] = lambda r: 1.0,
    ssm: bool = False,
) -> Callable[[nn.Module, int], None]:
    """Return what adapts ``targets``, with rank and blocks fitted to the budget."""

    def apply(model: nn.Module, target: int) -> None:
        shapes = projectors(model, targets)
        # Without attention, "everywhere" would be another name for the mixers.
        wanted = _ATTENTION if set(_ATTENTION) <= set(targets) else targets
        if not projectors(model, wanted):
            raise Unfit(f"the base has none of {', '.join(wanted)}")
        fixed = sum(p.numel() for n, p in model.named_parameters() if _is_ssm(n)) if ssm else 0
        knobs = fit(shapes, target, scale=scale, blocks=blocks, fixed=fixed)
        present = tuple(name for name in targets if projectors(model, [name]))
        apply_prodial(
            model,
            ProdialConfig(
                target_modules=present,
                r=knobs.r,
                lora_alpha=alpha(knobs.r) * knobs.r,
                diagonal=diagonal,
                train_scale=scale,
                train_diagonal=blocks is not None,
                block_size=max(1, knobs.block),
                train_ssm=("all",) if ssm else (),
                allow_partial=True,
            ),
        )

    return apply


def _is_ssm(name: str) -> bool:
    parts = {part.removesuffix("_b") for part in name.split(".")}
    return bool(parts & {"A_log", "D", "dt_bias", "conv1d"}) or name.endswith("dt_proj.bias")


def _diagonal(scale: bool, train_diagonal: bool = True, r: int = 0) -> Callable[..., None]:
    def apply(model: nn.Module, target: int) -> None:
        del target
        config = ProdialConfig(r=r, train_scale=scale, train_diagonal=train_diagonal)
        apply_prodial(model, config)

    return apply


def _transform(block: int | None, offdiagonal: bool = False) -> Callable[[nn.Module, int], None]:
    """W' = W T with T trained from the identity: whole, in blocks, or without its diagonal."""

    def apply(model: nn.Module, target: int) -> None:
        del target
        sizes: dict[str, int] = {}
        for name in BOTH:
            inputs = projectors(model, [name])[0][0]
            sizes[name] = inputs if block is None else min(block, inputs)
        apply_prodial(
            model,
            ProdialConfig(
                r=0, diagonal="free", train_scale=False, block_size=sizes, target_modules=BOTH
            ),
        )
        if offdiagonal:
            for module in model.modules():
                if isinstance(module, ProdialLinear):
                    _hold_diagonal(module)

    return apply


def _hold_diagonal(module: Any) -> None:
    """Keep the diagonal of D_b at one: its deviation starts at zero and gets no gradient."""
    deviation = next(p for n, p in module.named_parameters() if n.endswith("prodial_blocks"))

    def without_diagonal(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.diagonal(dim1=-2, dim2=-1).zero_()
        return gradient

    deviation.register_hook(without_diagonal)


def _none(model: nn.Module, target: int) -> None:
    del target
    model.requires_grad_(False)


METHODS = (
    Method("none", "not trained", _none, own_size=True, group="reference"),
    Method("lora", "LoRA", _prodial(scale=False, blocks=None)),
    Method(
        "rslora", "rsLoRA", _prodial(scale=False, blocks=None, alpha=lambda r: 4.0 / r**0.5)
    ),
    Method("prodial", "ProDiaL relu, s, 1×1", _prodial()),
    Method("prodial-free", "ProDiaL free, s, 1×1", _prodial(diagonal="free")),
    Method("prodial-no-s", "ProDiaL relu, 1×1", _prodial(scale=False)),
    Method("prodial-blocks", "ProDiaL relu, s, blocks", _prodial(blocks="larger")),
    Method(
        "prodial-free-blocks", "ProDiaL free, s, blocks",
        _prodial(diagonal="free", blocks="larger"),
    ),
    Method("prodial-ssm", "ProDiaL relu, s, 1×1, and SSM", _prodial(ssm=True)),
    Method("lora-in", "LoRA, in_proj", _prodial(("in_proj",), scale=False, blocks=None)),
    Method("lora-out", "LoRA, out_proj", _prodial(("out_proj",), scale=False, blocks=None)),
    Method("prodial-in", "ProDiaL, in_proj", _prodial(("in_proj",))),
    Method("prodial-out", "ProDiaL, out_proj", _prodial(("out_proj",))),
    Method("diagonal", "D_b, 1×1", _diagonal(False), VECTOR_RATES, own_size=True),
    Method("diagonal-s", "D_b, 1×1, and s", _diagonal(True), VECTOR_RATES, own_size=True),
    Method("t-free", "T whole", _transform(None), ADAPTER_RATES, own_size=True, group="figure4"),
    Method(
        "t-centric", "T in blocks of 16", _transform(16), ADAPTER_RATES, own_size=True,
        group="figure4",
    ),
    Method(
        "t-diagonal", "T's diagonal", _transform(1), VECTOR_RATES, own_size=True, group="figure4"
    ),
    Method(
        "t-offdiagonal", "T without its diagonal", _transform(None, True), ADAPTER_RATES,
        own_size=True, group="figure4",
    ),
    Method(
        "lora-attention", "LoRA, attention", _prodial(_ATTENTION, scale=False, blocks=None),
        families=("language",), group="placement",
    ),
    Method(
        "lora-all", "LoRA, everywhere",
        _prodial((*BOTH, *_ATTENTION, *_MLP), scale=False, blocks=None),
        families=("language",), group="placement",
    ),
    Method(
        "prodial-attention", "ProDiaL, attention", _prodial(_ATTENTION),
        families=("language",), group="placement",
    ),
    Method(
        "prodial-all", "ProDiaL, everywhere", _prodial((*BOTH, *_ATTENTION, *_MLP)),
        families=("language",), group="placement",
    ),
)  # fmt: skip
