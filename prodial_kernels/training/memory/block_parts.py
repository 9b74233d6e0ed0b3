"""What a block has beside its state-space mixer: attention, MLPs, experts, norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prodial_kernels.linear import adapted_layers
from prodial_kernels.quantization.modules.experts import QuantizedExperts
from prodial_kernels.quantization.modules.selection import is_experts

_BETWEEN = ("linear", "router")


@dataclass(frozen=True)
class AttentionShape:
    """Attention of a block: features of its queries, and of keys or values; heads."""

    queries: int
    keys: int
    heads: int


@dataclass(frozen=True)
class MlpShape:
    """An MLP, or the shared experts of a mixture.

    Attributes:
        inner: Features between its two products.
        gated: Whether a second product gates the first.
        squares: Whether its activation is a square, whose backward takes more tensors.
    """

    inner: int
    gated: bool
    squares: bool = False


@dataclass(frozen=True)
class ExpertsShape:
    """The routed experts of a mixture.

    Attributes:
        number: How many there are.
        chosen: How many a token takes.
        width: Features that they take and give.
        mlp: One of them.
        fp32: Whether the weights of a token's choices, and so their products, are in fp32.
    """

    number: int
    chosen: int
    width: int
    mlp: MlpShape
    fp32: bool


@dataclass(frozen=True)
class BlockParts:
    """The parts of a block.

    Attributes:
        norms: Features of each norm that reads what goes from block to block.
        attention: Its attention, if any; beside a mixer or in the place of one.
        mlps: Its MLPs, and shared experts.
        experts: Its routed experts, if any.
        adapted: Shapes (N, K) of adapted layers that are not a mixer's projectors.
        complete: Whether these and the mixer hold all of its linear layers.
    """

    norms: tuple[int, ...] = ()
    attention: AttentionShape | None = None
    mlps: tuple[MlpShape, ...] = ()
    experts: ExpertsShape | None = None
    adapted: tuple[tuple[int, int], ...] = ()
    complete: bool = False


def parts_of(block: nn.Module, mixer: nn.Module | None) -> BlockParts:
    """Find what a block has beside ``mixer``, by the names that the families give their layers."""
    attention, experts, mlps = None, None, []
    inside = set() if mixer is None else {id(module) for module in mixer.modules()}
    seen: set[int] = set()
    for module in block.modules():
        if id(module) in inside or id(module) in seen:
            continue
        own: Any = module
        if {"q_proj", "k_proj", "v_proj", "o_proj"} <= set(module._modules):
            attention = _attention(own)
        elif is_experts(module) or isinstance(module, QuantizedExperts):
            experts = _experts(block, own)
        elif (mlp := _mlp(own)) is not None:
            mlps.append(mlp)
        else:
            continue
        seen |= {id(each) for each in module.modules()}
    # Between Zamba's shared attention and the mixer, and before experts: frozen, they keep nothing
    # that is not counted there.
    linears = {
        id(module)
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] not in _BETWEEN
    }
    return BlockParts(
        _norms(block, inside), attention, tuple(mlps), experts, _adapted(block, mixer),
        linears <= seen | inside,
    )  # fmt: skip


def _attention(module: Any) -> AttentionShape:
    queries: int = module.q_proj.out_features
    size: int = getattr(module, "head_dim", None) or queries
    return AttentionShape(queries, module.k_proj.out_features, max(1, queries // size))


def _mlp(module: Any) -> MlpShape | None:
    has = set(module._modules)
    act = getattr(module, "act_fn", getattr(module, "activation", None))
    if {"up_proj", "down_proj"} <= has:
        return MlpShape(module.down_proj.in_features, "gate_proj" in has, _squares(act))
    if {"gate_up_proj", "down_proj"} <= has:
        return MlpShape(module.down_proj.in_features, True, _squares(act))
    if {"input_linear", "output_linear"} <= has:
        inner = module.output_linear.in_features
        return MlpShape(inner, module.input_linear.out_features == 2 * inner, _squares(act))
    return None


def _experts(block: nn.Module, module: Any) -> ExpertsShape:
    if isinstance(module, QuantizedExperts):
        down = module.stacks["down_proj"]
        number, width, inner = len(down), down.out_features, down.in_features
        gated = module.gated
    else:
        number, width, inner = module.down_proj.shape
        gated = module.has_gate
    router: Any = next(each for each in block.modules() if hasattr(each, "top_k"))
    # Of Nemotron-H, which chooses in fp32 and leaves the weights of the choices so.
    fp32 = hasattr(router, "e_score_correction_bias")
    mlp = MlpShape(inner, gated, _squares(module.act_fn))
    return ExpertsShape(number, int(router.top_k), width, mlp, fp32)


def _squares(activation: Any) -> bool:
    return "squared" in type(activation).__name__.lower()


def _norms(block: nn.Module, inside: set[int]) -> tuple[int, ...]:
    return tuple(
        module.weight.shape[0]
        for path, module in block.named_modules()
        if "norm" in type(module).__name__.lower()
        and id(module) not in inside
        and isinstance(getattr(module, "weight", None), torch.Tensor)
        and not path.endswith(("q_norm", "k_norm"))
    )


def _adapted(block: nn.Module, mixer: nn.Module | None) -> tuple[tuple[int, int], ...]:
    projectors = set() if mixer is None else {id(module) for module in mixer._modules.values()}
    return tuple(
        (layer.out_features, layer.in_features)
        for layer in adapted_layers(block).values()
        if id(layer) not in projectors
    )
