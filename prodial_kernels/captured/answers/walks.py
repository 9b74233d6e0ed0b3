"""What a training loop asks of the whole model in every step, answered without a walk over it.

``parameters()`` (of clipping and ``zero_grad``), ``train()`` and transformers' ``num_parameters()``
visit every module in Python: some hundreds, in each step, while the device has nothing to do.
Between two changes of the model the answers are the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from itertools import chain
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

_training = itemgetter("training")
# Whose own train() does nothing where no flag would change.
_KNOWN = frozenset(("torch.nn.modules.module", "transformers.modeling_utils"))


class Walks:
    """Methods of a model that are answered from memory, until :meth:`remove`.

    They are attributes of the instance; copies and pickles of the model hold its own methods. A
    module, parameter or buffer that was added, removed or replaced is noticed at the next call.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take over what of the methods the model does not define otherwise."""
        self._census = _Census(model)
        own: Any = type(model)
        self._remembered: list[_Remembered] = []
        if all(getattr(own, name) is getattr(nn.Module, name) for name in _PARAMETERS):
            self._remember(model, "parameters", self._parameters)
        if all(_trains_as_known(module) for module in self._census.modules):
            self._remember(model, "train", self._train)
        counting = next((m for m in self._census.modules if hasattr(type(m), _COUNT)), None)
        if counting is not None:
            self._remember(counting, _COUNT, self._num_parameters)

    def remove(self) -> None:
        """Restore the model's own methods."""
        for one in self._remembered:
            one.remove()
        self._remembered = []

    def _remember(
        self, owner: nn.Module, name: str, answer: Callable[[_Remembered, Any, Any], Any]
    ) -> None:
        if name not in vars(owner):
            self._remembered.append(_Remembered(owner, name, answer))

    def _current(self) -> _Census:
        if not self._census.holds():
            self._census = _Census(self._census.model)
        return self._census

    def _parameters(self, own: _Remembered, args: Any, kwargs: Any) -> Iterator[nn.Parameter]:
        if args or kwargs:
            asked: Iterator[nn.Parameter] = own.itself(*args, **kwargs)
            return asked
        return iter(self._current().parameters)

    def _train(self, own: _Remembered, args: Any, kwargs: Any) -> nn.Module:
        mode = args[0] if args else kwargs.get("mode", True)
        if len(args) + len(kwargs) > 1 or {*map(_training, self._current().states)} != {mode}:
            trained: nn.Module = own.itself(*args, **kwargs)
            return trained
        return self._census.model

    def _num_parameters(self, own: _Remembered, args: Any, kwargs: Any) -> int:
        if args or any(name != "exclude_embeddings" for name in kwargs):
            counted: int = own.itself(*args, **kwargs)
            return counted
        census = self._current()
        key = kwargs.get("exclude_embeddings", False)
        if key not in census.counts:
            census.counts[key] = own.itself(**kwargs)
        return census.counts[key]


_COUNT = "num_parameters"
_PARAMETERS = ("parameters", "named_parameters", "named_modules")


class _Census:
    """The modules and parameters of a model, while they stay the same."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = [*model.modules()]
        self.states = [vars(module) for module in self.modules]
        self.parameters = [*nn.Module.parameters(model)]
        self.counts: dict[Any, int] = {}
        self._held: list[dict[str, Any]] = [
            held for m in self.modules for held in (m._modules, m._parameters)
        ]
        # Held, so that no other object has the same id.
        self._values = [*chain.from_iterable(map(dict.values, self._held))]
        self._identities = [*map(id, self._values)]
        self._sizes = [*map(Tensor.numel, self.parameters)]

    def holds(self) -> bool:
        """Whether nothing was added, removed, replaced or resized since."""
        return [
            *map(id, chain.from_iterable(map(dict.values, self._held)))
        ] == self._identities and [*map(Tensor.numel, self.parameters)] == self._sizes


class _Remembered:
    """A method of a model, as an attribute of the instance."""

    def __init__(
        self, owner: nn.Module, name: str, answer: Callable[[_Remembered, Any, Any], Any]
    ) -> None:
        self._owner = weakref.ref(owner)
        self._name = name
        self._answer = answer
        setattr(owner, name, self)

    def itself(self, *args: Any, **kwargs: Any) -> Any:
        owner = self._owner()
        return getattr(type(owner), self._name)(owner, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer(self, args, kwargs)

    def __reduce__(self) -> Any:
        return OwnMethod, (self._owner(), self._name)

    def remove(self) -> None:
        owner = self._owner()
        if owner is not None and vars(owner).get(self._name) is self:
            delattr(owner, self._name)


class OwnMethod:
    """A method of a module's class, as an attribute of a copied or unpickled module."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        """Stand for ``type(owner).name`` of ``owner``."""
        self.owner = owner
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return getattr(type(self.owner), self._name)(self.owner, *args, **kwargs)


def _trains_as_known(module: nn.Module) -> bool:
    return "train" not in vars(module) and type(module).train.__module__ in _KNOWN
