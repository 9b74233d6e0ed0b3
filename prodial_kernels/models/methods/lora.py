"""Where the terms of LoRA and of partial LoRA go in a model."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from prodial_kernels.config import ProdialConfig
from prodial_kernels.methods import Lora, Method, PartialLora
from prodial_kernels.models.methods.base import Site
from prodial_kernels.models.methods.low_rank import (
    EMBEDDED,
    EmbeddedTerm,
    PatchTerm,
    ReadTerm,
    StackedTerm,
    Term,
    terms_of,
)
from prodial_kernels.models.methods.mixer_parts import mixers_of, rows_of
from prodial_kernels.models.placements import resolve_placements
from prodial_kernels.module_tree import module_paths
from prodial_kernels.quantization import QuantizedLinear

EMBED = "embed"
"""The target that means the embedding of tokens, or of patches."""
PATCHES = ".patch_embed.proj"
"""How the path of a patch embedding's convolution ends."""
# Of a mixer: the layers whose weight the fused functions read, in both directions.
_READ = {"x_proj": ("x_proj", "x_proj_b"), "dt_proj": ("dt_proj", "dt_proj_b")}


def stacked_on(model: nn.Module, methods: Iterable[Method]) -> ProdialConfig | None:
    """Return which layers must be adapted layers for the terms of ``methods``; None for none."""
    names: dict[str, None] = {}
    for method in methods:
        if isinstance(method, Lora):
            names |= dict.fromkeys(n for n in method.targets if n != EMBED and n not in _READ)
        elif isinstance(method, PartialLora):
            rows = [each for _, mixer in mixers_of(model) for part in method.rows
                    for each in rows_of(mixer, part)]  # fmt: skip
            names |= dict.fromkeys(each.child for each in rows if each.child not in _all_read())
    if not names:
        return None
    return resolve_placements(model, ProdialConfig(target_modules=tuple(names), allow_partial=True))


def lora_sites(model: nn.Module, method: Lora) -> list[Site]:
    """Plan LoRA's terms; ValueError where a target is not there or cannot have one."""
    sites: list[Site] = []
    for target in method.targets:
        if target == EMBED:
            sites.append(_embedding_site(model, method))
        elif target in _READ:
            sites += _read_sites(model, method, target)
        else:
            found = stacked_on(model, [Lora(targets=(target,))])
            sites += [
                _stacked_site(model, method, paths[0], module, "lora", None)
                for module, paths in module_paths(model).items()
                if found is not None
                and isinstance(module, nn.Linear | QuantizedLinear)
                and any(found.target_of(path) is not None for path in paths)
            ]
    return sites


def partial_lora_sites(model: nn.Module, method: PartialLora) -> list[Site]:
    """Plan partial LoRA's terms; ValueError where no mixer has such rows."""
    sites: list[Site] = []
    for part in method.rows:
        before = len(sites)
        for path, mixer in mixers_of(model):
            for rows in rows_of(mixer, part):
                layer = mixer._modules[rows.child]
                make = _read_site if rows.child in _all_read() else _stacked_site
                where = _joined(path, rows.child)
                sites.append(
                    make(model, method, where, layer, f"lora_{part}", (rows.start, rows.stop))
                )
        if len(sites) == before:
            raise ValueError(
                f"partial-lora: no mixer of this model has rows {part!r} of its own: "
                + (
                    "they are halves of Mamba's in_proj, or parts of Mamba-2's"
                    if part in ("X", "Z")
                    else "they are parts of Mamba-1's x_proj, or of Mamba-2's in_proj"
                )
                + "; take it out of rows"
            )
    return sites


def _all_read() -> set[str]:
    return {name for names in _READ.values() for name in names}


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _read_sites(model: nn.Module, method: Lora, target: str) -> list[Site]:
    sites = [
        _read_site(model, method, _joined(path, name), mixer._modules[name], "lora", None)
        for path, mixer in mixers_of(model)
        for name in _READ[target]
        if name in mixer._modules
    ]
    if not sites:
        raise ValueError(
            f"lora: no mixer of this model has a layer {target!r}; it is Mamba-1's. Take it out of "
            "targets"
        )
    return sites


def _read_site(
    model: nn.Module, method: Any, path: str, layer: Any, tag: str, rows: tuple[int, int] | None
) -> Site:
    """A term in a weight that others read."""
    weight = layer._parameters.get("weight") if isinstance(layer, nn.Linear) else None
    if type(weight) is not nn.Parameter:
        raise ValueError(
            f"{method.name}: {path} is a {type(layer).__name__} without a dense weight of its own, "
            "and its term is added to the weight; leave the layer dense when the model is "
            "quantised, or take it out of this method"
        )
    if method.dropout:
        raise ValueError(
            f"{method.name}: dropout={method.dropout} on {path}, whose weight is read instead of "
            "the layer being called, and a weight cannot express dropout; give these layers a "
            "method of their own with dropout=0"
        )
    term = _term(method, tag, layer.out_features, rows)
    return Site(path, term.shapes(method.r, layer.in_features),
                partial(ReadTerm, layer, method, term, method.r), plain=True)  # fmt: skip


def _stacked_site(
    model: nn.Module, method: Any, path: str, layer: Any, tag: str, rows: tuple[int, int] | None
) -> Site:
    """A term on a projector, which is an adapted layer by the time that it is installed."""
    term = _term(method, tag, layer.out_features, rows)
    shapes = term.shapes(method.r, layer.in_features)
    return Site(path, shapes, partial(_stack, model, path, method, term))


def _stack(model: nn.Module, path: str, method: Any, term: Term) -> StackedTerm:
    layer: Any = model.get_submodule(path)
    own = layer.lora_dropout if layer.r else method.dropout
    others = [each.dropout for each in terms_of(layer)]
    if any(dropout != method.dropout for dropout in (own, *others)):
        raise ValueError(
            f"{method.name}: dropout={method.dropout} on {path}, where another low-rank term has "
            "another one, and one product computes both; give both the same"
        )
    return StackedTerm(layer, method, term, method.r)


def _term(method: Any, tag: str, rows: int, covered: tuple[int, int] | None) -> Term:
    start, stop = covered or (0, rows)
    return Term(tag, method.alpha / method.r, method.dropout, start, stop, rows)


def _embedding_site(model: nn.Module, method: Lora) -> Site:
    if method.dropout:
        raise ValueError(
            f"lora: dropout={method.dropout} on {EMBED!r}, whose input is numbers of tokens, or "
            "whose weight is read as a whole; give it a method of its own with dropout=0"
        )
    for module, path in _paths(model):
        if isinstance(module, nn.Conv2d) and f".{path}".endswith(PATCHES):
            term = _term(method, "lora", module.out_channels, None)
            own = term.shapes(method.r, module.weight[0].numel())
            return Site(path, own, partial(PatchTerm, module, method, term, method.r))
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Embedding):
        found = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        if len(found) != 1:
            raise ValueError(
                f"lora: targets={EMBED!r} needs one embedding of tokens, and this "
                f"{type(model).__name__} has {len(found)}; take it out of targets"
            )
        embedding = found[0]
    path = next(path for module, path in _paths(model) if module is embedding)
    a, b = EMBEDDED
    shapes: dict[str, tuple[int, ...]] = {
        a: (embedding.num_embeddings, method.r), b: (embedding.embedding_dim, method.r)
    }  # fmt: skip
    scaling = (method.alpha or 0.0) / method.r
    return Site(path, shapes, partial(EmbeddedTerm, embedding, method, scaling, method.r))


def _paths(model: nn.Module) -> Iterable[tuple[nn.Module, str]]:
    return ((module, paths[0]) for module, paths in module_paths(model).items())
