"""Named placements: which linear layers ``target_modules="mixer"`` and its like mean in a model.

A layer's part is told by the module that holds it: a mixer keeps a recurrence's parameters or a
convolution along the sequence, attention has queries, an MLP projects down again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from prodial_kernels.config import PLACEMENTS, ProdialConfig
from prodial_kernels.module_patterns import matches_name
from prodial_kernels.module_tree import module_paths
from prodial_kernels.quantization.foreign import is_linear

_PARTS = ("mixer", "attention", "mlp")
# Inside a mixer: narrow, and not what "projector" means.
_INNER = ("x_proj", "dt_proj")
_QUERIES = ("q_proj", "qkv_proj", "query_key_value", "q_a_proj", "kv_a_proj_with_mqa", "Wqkv")
_DOWN = ("down_proj", "fc2", "w2", "output_linear", "dense_4h_to_h")
_ROUTERS = ("gate", "router", "shared_expert_gate")
# Their attention and MLP are one block used at many depths, which an adapter would change at all
# of them; its makers adapted each use by itself.
_MIXERS_ALONE = ("zamba", "zamba2")


def auto_placement(model: nn.Module) -> tuple[str, ...]:
    """Return the parts that ``"auto"`` means: all that a model has, of Zamba the mixers alone.

    That is what the makers of Nemotron-H, Falcon-H1 and Jamba recommend, but for the ``out_proj``
    that they leave out for their toolkits' sake.
    """
    there = {part for _, part in _layers(model).values()}
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in _MIXERS_ALONE and "mixer" in there:
        return ("mixer",)
    return tuple(part for part in _PARTS if part in there)


def resolve_placements(model: nn.Module, config: ProdialConfig) -> ProdialConfig:
    """Return ``config`` with names of layers in the place of placements.

    Raises:
        ValueError: The model has no layers of that part.
    """
    targets = config.target_modules
    if isinstance(targets, str) or not {*targets} & {*PLACEMENTS}:
        return config
    names: list[str] = []
    for target in targets:
        names += placed(model, target) if target in PLACEMENTS else [target]
    # A part may be some of the layers that share a name: then their numbers tell them apart.
    numbered = any(part.isdigit() for name in names for part in name.split("."))
    return replace(
        config,
        target_modules=tuple(dict.fromkeys(names)),
        allow_partial=config.allow_partial or numbered,
    )


def placed(model: nn.Module, placement: str) -> list[str]:
    """Return names for ``target_modules`` that match the layers of a placement and no others.

    Raises:
        ValueError: The model has no such layers.
    """
    layers = _layers(model)
    parts: tuple[str, ...] = (placement,)
    if placement == "auto":
        parts = auto_placement(model)
    elif placement == "all":
        parts = _PARTS
    wanted = [path for path, part in layers.values() if part in parts]
    if not wanted:
        there = sorted({part for _, part in layers.values() if part})
        raise ValueError(
            f"target_modules={placement!r}: this model has no such layers; it has "
            f"{', '.join(there) or 'none that a placement knows'}. Name the layers instead"
        )
    others = [path for path, part in layers.values() if part not in parts]
    return list(dict.fromkeys(_shortest(path, others) for path in wanted))


def is_mixer(module: nn.Module) -> bool:
    """Whether ``module`` holds a recurrence's own parameters: A_log, or a step size's bias."""
    own = module._parameters
    return own.get("A_log") is not None or own.get("dt_bias") is not None


def is_recurrent(module: nn.Module) -> bool:
    """Whether ``module`` mixes along the sequence by a recurrence or a convolution of its own."""
    return is_mixer(module) or any(isinstance(child, nn.Conv1d) for child in module.children())


def _layers(model: nn.Module) -> dict[nn.Module, tuple[str, str]]:
    """Return every linear layer's first path and part; the part is empty where it is unknown."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        module: (paths[0], _part_of(model, paths[0]))
        for module, paths in module_paths(model).items()
        if is_linear(module) and module is not head
    }


def _part_of(model: nn.Module, path: str) -> str:
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    children = {child for child, _ in owner.named_children()}
    numbered = name.isdigit() or any(
        part == "experts" and after.isdigit()
        for part, after in zip(path.split("."), path.split(".")[1:], strict=False)
    )
    if numbered or name in _ROUTERS:
        return ""
    if is_recurrent(owner):
        return "" if name in _INNER else "mixer"
    if children & {*_QUERIES} or "attention" in type(owner).__name__.lower():
        return "attention"
    return "mlp" if children & {*_DOWN} else ""


def _shortest(path: str, others: Iterable[str]) -> str:
    """Return the shortest end of ``path`` that no path of ``others`` ends with."""
    parts = path.split(".")
    others = list(others)
    for length in range(1, len(parts) + 1):
        name = ".".join(parts[-length:])
        if not any(matches_name(other, name) for other in others):
            return name
    return path
