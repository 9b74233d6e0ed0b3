"""The structure of a model before a change, to restore when an error or interrupt stops it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Snapshot:
    """Classes, attributes, children, hooks and flags of every module; no value is copied."""

    def __init__(self, model: nn.Module) -> None:
        """Record the structure of ``model``."""
        self._modules = [
            (module, type(module), dict(vars(module)), _registries(module))
            for module in model.modules()
        ]
        self._parameters = [
            (parameter, parameter.requires_grad, parameter.data, parameter.grad)
            for parameter in model.parameters()
        ]

    def restore(self) -> None:
        """Restore the model's structure; values that were changed in place stay changed."""
        for module, cls, attributes, registries in self._modules:
            module.__class__ = cls
            for registry, content in registries:
                registry.clear()
                registry.update(content)
            vars(module).clear()
            vars(module).update(attributes)
        for parameter, requires_grad, data, grad in self._parameters:
            if parameter.dtype != data.dtype:
                parameter.grad = None
                parameter.data = data
            _set_flag(parameter, requires_grad)
            parameter.grad = grad


@contextmanager
def trainable_tensors() -> Iterator[None]:
    """Make tensors that can be trained later, in ``torch.inference_mode`` too."""
    with_gradients = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(with_gradients):
        yield


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Restore the structure of ``model`` if the block raises; with :func:`trainable_tensors`."""
    before = Snapshot(model)
    try:
        with trainable_tensors():
            yield
    except BaseException:
        before.restore()
        raise


def _registries(module: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the dictionaries of parameters, buffers, children and hooks, each with a copy."""
    return [
        (value, value.copy())
        for name, value in vars(module).items()
        if name.startswith("_") and isinstance(value, dict)
    ]


def _set_flag(parameter: Tensor, requires_grad: bool) -> None:
    if parameter.requires_grad != requires_grad:
        parameter.requires_grad_(requires_grad)
