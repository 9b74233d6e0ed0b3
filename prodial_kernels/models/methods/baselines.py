"""Which parameters the baselines train as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from prodial_kernels.methods import Full, LinearProbe, Method
from prodial_kernels.module_patterns import matches_name
from prodial_kernels.module_tree import module_paths

# What models that classify call their head.
_HEADS = ("score", "classifier", "head", "lm_head")


def trained_as_they_are(model: nn.Module, method: Method) -> Iterator[nn.Parameter]:
    """Yield the parameters of the model itself that a method trains in place.

    Raises:
        ValueError: The model has no such modules, or quantised weights are among them.
    """
    if isinstance(method, Full):
        stored = [p for p in model.parameters() if not p.is_floating_point()]
        if stored or any(hasattr(m, "packed_weight") for m in model.modules()):
            raise ValueError(
                "full: the model holds quantised weights, which cannot be trained; load it dense"
            )
        yield from model.parameters()
    elif isinstance(method, LinearProbe):
        found = _heads(model, method)
        for head in found:
            yield from (p for p in head.parameters() if p.is_floating_point())


def _heads(model: nn.Module, method: LinearProbe) -> list[nn.Module]:
    paths = module_paths(model)
    if method.head:
        every = [path for own in paths.values() for path in own]
        missing = [n for n in method.head if not any(matches_name(path, n) for path in every)]
        if missing:
            raise ValueError(f"linear-probe: head={missing[0]!r} matches no module of this model")
        return [m for m, own in paths.items()
                if any(matches_name(p, n) for p in own for n in method.head)]  # fmt: skip
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(output, nn.Module):
        return [output]
    for name in _HEADS:
        head = model._modules.get(name)
        if head is not None and any(True for _ in head.parameters()):
            return [head]
    raise ValueError(
        f"linear-probe: this {type(model).__name__} has none of the heads {', '.join(_HEADS)}; "
        "name its modules in head"
    )
