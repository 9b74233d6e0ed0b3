"""What of a model can be stored, and of which kind it is.

``EVERYTHING`` takes every frozen linear layer, the embeddings, the head and the experts of
mixtures. Left dense is what is small and decides much: routers, norms, convolutions, and what a
state-space mixer's recurrence is made from (``x_proj``, ``dt_proj``, and A, D and the like).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from prodial_kernels.module_patterns import matches_name
from prodial_kernels.module_tree import has_hooks, module_paths

EVERYTHING = "all"
"""As ``target_modules``: whatever can be stored."""

PROJECTORS = ("in_proj", "out_proj")
"""The default ``target_modules``."""

TIED = "embeddings and head"
"""The kind of a weight that an embedding and the head share."""

_NEVER = ("router", "gate", "x_proj", "dt_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")
_MLP = (
    "up_proj", "gate_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "input_linear",
    "output_linear",
)  # fmt: skip
_EXPERT_WEIGHTS = ({"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"})


@dataclass(frozen=True)
class Selection:
    """What of a model is stored; of each layer all the paths that lead to it.

    Attributes:
        linears: Linear layers; where several share one weight and bias, as tied blocks do, the
            paths of all.
        embeddings: Embeddings without those of ``tied``.
        tied: Embeddings with the paths of the head that has their weight.
        experts: Modules that hold the experts of a mixture.
    """

    linears: tuple[tuple[str, ...], ...]
    embeddings: tuple[tuple[str, ...], ...] = ()
    tied: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()
    experts: tuple[tuple[str, ...], ...] = ()


def select_everything(model: nn.Module, exclude: Iterable[str] = ()) -> Selection:
    """Return all of ``model`` that can be stored; it may be on the meta device, and adapted.

    Args:
        model: The model; layers that are stored already are not among them.
        exclude: Names, or endings of dotted paths, of modules that stay dense with all in them.

    Raises:
        ValueError: A name that matches nothing, or a module with hooks, which would be lost.
    """
    paths = module_paths(model)
    left_out = tuple(exclude)
    for name in left_out:
        if not any(_within(path, name) for found in paths.values() for path in found):
            raise ValueError(f"exclude {name!r} matches no module of this model")
    candidates = {
        module: found
        for module, found in paths.items()
        if not any(_within(path, name) for path in found for name in left_out)
    }
    kept_dense = {
        id(tensor)
        for module in paths.keys() - candidates.keys()
        for tensor in module._parameters.values()
        if tensor is not None
    }
    by_weight: dict[int, list[nn.Module]] = {}
    experts = []
    for module, found in candidates.items():
        if type(module) in (nn.Linear, nn.Embedding) and not _is_never(found[0]):
            weight: Any = module.weight
            trained = weight.requires_grad and _is_adapted(model)
            if id(weight) not in kept_dense and weight.is_floating_point() and not trained:
                by_weight.setdefault(id(weight), []).append(module)
        elif is_experts(module):
            experts.append(_hookless(module, found))
    linears, embeddings, tied = [], [], []
    for modules in by_weight.values():
        for module in modules:
            _hookless(module, candidates[module])
        tables = [m for m in modules if isinstance(m, nn.Embedding)]
        layers = [m for m in modules if isinstance(m, nn.Linear)]
        if len({id(m.bias) for m in layers}) > 1 or any(map(_is_special, tables)):
            continue
        of_tables = tuple(path for m in tables for path in candidates[m])
        of_layers = tuple(path for m in layers for path in candidates[m])
        if tables and layers:
            tied.append((of_tables, of_layers))
        elif tables:
            embeddings.append(of_tables)
        else:
            linears.append(of_layers)
    return Selection(tuple(linears), tuple(embeddings), tuple(tied), tuple(experts))


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` holds a mixture's experts as transformers does, in a layout that is known.

    3-D weights [experts, out, in], without biases, as Nemotron-H, Granite 4 and Jamba have them.
    """
    weights = {name: p for name, p in module._parameters.items() if p is not None}
    own: Any = module
    return (
        set(weights) in _EXPERT_WEIGHTS
        and all(weight.ndim == 3 for weight in weights.values())
        and getattr(own, "has_gate", None) is ("gate_up_proj" in weights)
        and not getattr(own, "has_bias", True)
        and not getattr(own, "is_transposed", True)
        and not getattr(own, "has_post_expert_norm", False)
        and getattr(own, "is_concatenated", False)
        and callable(getattr(own, "act_fn", None))
        and getattr(type(own)._apply_gate, "__name__", "") == "_default_apply_gate"
    )


def kind_of(path: str, model: nn.Module) -> str:
    """Return the kind of the module at ``path``, such as ``"attention"`` or ``"experts"``."""
    parts = [part for part in path.split(".") if part != "base_layer"]
    module = model.get_submodule(path)
    leaf = parts[-1]
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if is_experts(module):
        return "experts"
    if any(part in ("experts", "expert") for part in parts):
        return "experts"
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if module is head or leaf in ("lm_head", "head"):
        return "head"
    if any("shared_expert" in part for part in parts[:-1]):
        return "shared experts"
    if leaf in PROJECTORS:
        return "projectors"
    if leaf in _ATTENTION:
        return "attention"
    return "MLP" if leaf in _MLP else "other linear layers"


def _within(path: str, name: str) -> bool:
    """Whether ``path`` is the module called ``name``, or lies in it."""
    parts = path.split(".")
    return any(matches_name(".".join(parts[: end + 1]), name) for end in range(len(parts)))


def _is_never(path: str) -> bool:
    return any(part in _NEVER for part in path.split("."))


def _is_special(table: nn.Embedding) -> bool:
    """Whether a lookup does more than to look up."""
    return table.max_norm is not None or table.sparse


def _is_adapted(model: nn.Module) -> bool:
    """Whether what requires a gradient is meant to: before that, every parameter does."""
    return not all(parameter.requires_grad for parameter in model.parameters())


def _hookless(module: nn.Module, found: tuple[str, ...]) -> tuple[str, ...]:
    if has_hooks(module):
        raise ValueError(f"{found[0]} has hooks, which would be lost; remove them first")
    return found


def stores_everything(names: Iterable[str]) -> bool:
    """Whether stored tensors of these names are more than a model's projectors."""
    owners = (name.removesuffix(".weight").rpartition(".")[2] for name in names)
    return any(owner not in PROJECTORS for owner in owners)
