"""A model's modules by their dotted paths, and putting another module where one stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def module_paths(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Return every module below ``model`` with every path that leads to it."""
    paths: dict[nn.Module, tuple[str, ...]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if module is not model:
            paths[module] = (*paths.get(module, ()), path)
    return paths


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run around the forward or the backward of ``module``."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks))


def place(model: nn.Module, paths: Iterable[str], module: nn.Module) -> None:
    """Put ``module`` at every one of the dotted ``paths``."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)


def replace_each(
    model: nn.Module,
    kind: type[ModuleT],
    make: Callable[[str, ModuleT], nn.Module],
    *,
    paths: Iterable[tuple[str, ...]] | None = None,
) -> None:
    """Put ``make(path, layer)`` in the place of each layer of class ``kind``, one after the other.

    No reference to a layer outlives its replacement, so that memory grows by one layer only.

    Args:
        model: Changed in place.
        kind: The class of the layers, subclasses included.
        make: Called once for each layer, with the first of the paths that lead to it.
        paths: All paths of each layer to replace; default: every layer of class ``kind``.

    Raises:
        RuntimeError: ``make`` has replaced a layer that is still to come.
    """
    if paths is None:
        paths = [names for module, names in module_paths(model).items() if isinstance(module, kind)]
    for names in paths:
        layer = model.get_submodule(names[0])
        if not isinstance(layer, kind):
            raise RuntimeError(
                f"{names[0]} changed from a {kind.__name__} while it was being replaced"
            )
        place(model, names, make(names[0], layer))
        del layer


def is_emptied_by_zero(tensor: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 keeps a part of a parameter in every process, and nothing here.

    Such a parameter has no elements; its attributes (deepspeed 0.19) say how many it had.
    """
    return tensor.numel() != getattr(tensor, "ds_numel", tensor.numel())
