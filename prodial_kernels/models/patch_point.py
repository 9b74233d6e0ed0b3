"""Replacing methods of upstream's modules, and restoring them: the base of every mixer family.

An adapted mixer keeps its parameters, children and attributes; only its class becomes a subclass
whose chosen methods go through a *policy*. Most policies run upstream's own method on a
:class:`View`, a proxy of the mixer with a few attributes replaced, which lives for one call: no
copy of upstream's code, and nothing shared between threads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from types import CellType, FunctionType
from typing import Any, Protocol

from torch import nn

from prodial_kernels import upstream

Policy = Callable[..., Any]
"""``(mixer, upstream_method, *args, **kwargs)`` -> what the method returns.

A module-level function, so that models pickle.
"""


_CHANGES = "_prodial_changes"
"""Attribute of an adapted class: the class of upstream's, and the policies of every change."""


class Undo(Protocol):
    """A change to a model that can be undone; copied and pickled together with the model."""

    def remove(self) -> None:
        """Undo the change."""


class Changes:
    """Changes to a model, in the order in which they were made, until :meth:`remove`."""

    def __init__(self, changes: Iterable[Undo] = ()) -> None:
        """Remember what to undo."""
        self._changes = [*changes]

    def remove(self) -> None:
        """Undo them, the last first; a second call does nothing."""
        while self._changes:
            self._changes.pop().remove()


class AdaptedMixer:
    """A mixer whose methods go through policies until :meth:`remove`."""

    def __init__(self, mixer: nn.Module, policies: Mapping[str, Policy]) -> None:
        """Replace the class of ``mixer``; its methods named in ``policies`` go through them."""
        self.mixer = mixer
        original: Any = type(mixer)  # mypy holds that classes of modules cannot be hashed
        # What makes the class again, and not the class, which pickle could not find.
        self._before = _changes_of(original)
        mixer.__class__ = _adapted_class(original, tuple(policies.items()))

    @property
    def original(self) -> type[nn.Module]:
        """The mixer's class before this change."""
        return _changed(*self._before)

    def remove(self) -> None:
        """Restore the class that the mixer had before."""
        self.mixer.__class__ = self.original


class View:
    """A proxy for upstream's ``self``: the mixer, except for the attributes given."""

    def __init__(self, mixer: nn.Module, /, **given: Any) -> None:
        """Answer with ``given`` where it has the name, else with the mixer's attribute."""
        # One by one, past the refusal below, which torch.compile of torch 2.11 can trace.
        for name, value in {**given, "_mixer": mixer}.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_mixer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        problem = f"{name} would be set on a view of the mixer, and lost"
        library = upstream.library_of(type(vars(self)["_mixer"]))
        raise AttributeError(
            problem if library is None else f"{problem}; {upstream.tested_with(library)}"
        )


def rebound(function: Any, **names: Any) -> Any:
    """Return ``function`` with global names of its module replaced; the module stays as it is.

    Decorators are copied too: the cell of a decorator that holds the decorated function holds its
    copy instead.

    Raises:
        UpstreamError: The function, or a decorator of it, cannot be copied this way.
    """
    if not isinstance(function, FunctionType):
        raise _not_copied(function)
    below = getattr(function, "__wrapped__", None)
    module, cells = function.__globals__, function.__closure__
    if below is None:
        module = {**module, **names}
    else:
        holding = [cell.cell_contents is below for cell in cells or ()]
        if sum(holding) != 1:
            raise _not_copied(function)
        inner = CellType(rebound(below, **names))
        cells = tuple(
            inner if holds else cell for cell, holds in zip(cells or (), holding, strict=True)
        )
    copied = FunctionType(
        function.__code__, module, function.__name__, function.__defaults__, cells
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _not_copied(function: Any) -> upstream.UpstreamError:
    name = f"{function.__module__}.{getattr(function, '__qualname__', function)}"
    library = upstream.library_of(function) or "torch"
    return upstream.error(library, f"{name} is decorated in a way that cannot be copied")


@cache
def _adapted_class(original: Any, policies: tuple[tuple[str, Policy], ...]) -> type[nn.Module]:
    """Return a subclass of the mixer's class whose methods go through ``policies``.

    A class rather than attributes of the instance, so that replicas of the module
    (``nn.DataParallel``), copies and pickles run on their own parameters.
    """

    def adapted(name: str, policy: Policy) -> Callable[..., Any]:
        def through_policy(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # Looked up at the call, so that a later replacement of upstream's method counts.
            return policy(self, getattr(original, name), *args, **kwargs)

        # inspect.signature gives upstream's. __wrapped__ would too, but callers would unwrap it
        # and leave the policy out.
        vars(through_policy)["__signature__"] = inspect.signature(getattr(original, name))
        return through_policy

    # A module may be changed more than once, by its own family and for what trains beside.
    plain, *before = _changes_of(original)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # Pickle finds classes by name, which this one does not have.
        _, _, *state = original.__reduce_ex__(self, protocol)
        return (_new_adapted, (plain, *before, policies), *state)

    members: dict[str, Any] = {name: adapted(name, policy) for name, policy in policies}
    members |= {"__reduce_ex__": reduce, "__module__": original.__module__}
    members[_CHANGES] = (plain, *before, policies)
    return type(original.__name__, (original,), members)


def _changes_of(cls: Any) -> tuple[Any, ...]:
    """Return upstream's class and the policies of each change that ``cls`` makes to it."""
    changes: tuple[Any, ...] = vars(cls).get(_CHANGES, (cls,))
    return changes


def _changed(cls: Any, *changes: tuple[tuple[str, Policy], ...]) -> Any:
    for policies in changes:
        cls = _adapted_class(cls, policies)
    return cls


def _new_adapted(cls: Any, *changes: tuple[tuple[str, Policy], ...]) -> nn.Module:
    cls = _changed(cls, *changes)
    made: nn.Module = cls.__new__(cls)
    return made
