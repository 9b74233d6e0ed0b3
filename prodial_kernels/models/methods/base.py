"""What a method puts into a model: tensors in modules, and parameters that are read through them.

A method plans :class:`Site` s, one per module, and changes nothing yet. Installed, a site is an
:class:`Addition`: its tensors are parameters of the module, in fp32 or wider, and either whoever
reads a parameter of the module as an attribute gets what a :class:`View` makes of it (every path of
every mixer does, the fused ones included), or a method of the module goes through a policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prodial_kernels.linear import ADDED as ADDED
from prodial_kernels.linear import BESIDE, OFFSETS_OFF, never_narrower
from prodial_kernels.methods import Method
from prodial_kernels.models.patch_point import AdaptedMixer, Policy

# Attributes of a module: the views of its attributes by name; attributes that views answer for;
# the names of the tensors that views read.
_VIEWS = "_prodial_views"
_SET_ASIDE = "_prodial_set_aside"
_READ = "_prodial_read_by_views"
_TABLES = (_VIEWS, _SET_ASIDE, _READ)


class View(Protocol):
    """What a read of an attribute gives; picklable, and kept on no model but the one it is for."""

    def __call__(self, module: nn.Module, value: Any) -> Any:
        """Return what ``value`` reads as; ``value`` itself where the view's tensors are gone."""


class Addition:
    """What one method has put into one module, until :meth:`remove`."""

    def __init__(
        self,
        module: nn.Module,
        method: Method | None,
        tensors: Mapping[str, Tensor],
        *,
        views: Mapping[str, View] | None = None,
        policies: Mapping[str, Policy] | None = None,
    ) -> None:
        """Register ``tensors``, and let them take effect.

        Args:
            module: Whose parameters they become.
            method: What trains them; None for the adapter itself (``train_ssm``).
            tensors: By the names of the parameters, which begin as :data:`BESIDE` says.
            views: By the names of the attributes whose reads they change. One that is no parameter,
                such as a size, is set aside until :meth:`remove`.
            policies: Of the module's methods; see :mod:`prodial_kernels.models.patch_point`.
        """
        self.module, self.method = module, method
        self.names = tuple(tensors)
        self.views = dict(views or {})
        for name, tensor in tensors.items():
            module.register_parameter(name, nn.Parameter(tensor))
        own: dict[str, Policy] = dict(policies or {})
        if self.views and _VIEWS not in vars(module):
            vars(module).update({table: {} for table in _TABLES})
            own |= {"__getattr__": read_viewed}
        # A layer with an adapter keeps its own parameters wide by itself.
        if tensors and not hasattr(module, "adapter_dtype"):
            own |= {"_apply": apply_keeping_wide}
        self._patched = "__getattr__" in own
        if self.views:
            vars(module)[_READ].update(dict.fromkeys(tensors))
        for name, view in self.views.items():
            table = vars(module)[_VIEWS]
            table[name] = (*table.get(name, ()), view)
            if name in vars(module):
                vars(module)[_SET_ASIDE][name] = vars(module).pop(name)
        self._class = AdaptedMixer(module, own) if own else None

    def fold(self) -> None:
        """Merge what is read through views into the module's parameters."""
        if self.views:
            fold_views(self.module)

    def remove(self) -> None:
        """Restore the pretrained values, or what :meth:`fold` made of them."""
        if self._class is not None:
            self._class.remove()
        own = vars(self.module)
        for name in self.names:
            own["_parameters"].pop(name, None)
            own.get(_READ, {}).pop(name, None)
        table = own.get(_VIEWS, {})
        for name, view in self.views.items():
            left = tuple(each for each in table.get(name, ()) if each is not view)
            if left:
                table[name] = left
                continue
            table.pop(name, None)
            if name in own.get(_SET_ASIDE, {}):
                before = own[_SET_ASIDE].pop(name)
                own[name] = view(self.module, before)
        if self._patched:
            for name in _TABLES:
                own.pop(name, None)
        own.pop(OFFSETS_OFF, None)


@dataclass(frozen=True)
class Site:
    """A module that a method adds tensors to.

    Attributes:
        path: Its dotted path in the plain model.
        shapes: Of the tensors, by the names of the parameters.
        install: Makes the change.
        plain: Whether the module must not become an adapted layer: what reads its weight reads
            this method's.
    """

    path: str
    shapes: Mapping[str, tuple[int, ...]]
    install: Callable[[], Addition]
    plain: bool = False


def switched_off(module: nn.Module) -> bool:
    """Whether ``module`` is to compute as the pretrained one (``adapter_disabled``)."""
    return bool(vars(module).get(OFFSETS_OFF))


def added(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return a tensor that a method has put into ``module``; None once it is gone."""
    parameter: nn.Parameter | None = vars(module)["_parameters"].get(name)
    return parameter


def pretrained(module: nn.Module, name: str) -> Tensor:
    """Return a parameter's pretrained value, whatever reading it gives."""
    value: Tensor = vars(module)["_parameters"][name].detach()
    return value


def wide_like(value: Tensor) -> torch.dtype:
    """The dtype to train beside ``value`` in: fp32, or fp64 for fp64."""
    return torch.promote_types(value.dtype, torch.float32)


def zeros_beside(value: Tensor, *shape: int) -> Tensor:
    """Return zeros on the device of ``value``, in the dtype to train in."""
    return torch.zeros(shape, dtype=wide_like(value), device=value.device)


def fold_views(module: nn.Module) -> None:
    """Make what is read the parameters' own values, in their dtypes, and drop what was added."""
    own = vars(module)["_parameters"]
    folded: dict[str, nn.Parameter | None] = dict(own)
    table: Mapping[str, tuple[View, ...]] = vars(module).get(_VIEWS, {})
    for name, views in table.items():
        value = own.get(name)
        if value is None:
            continue
        held = moved = value.detach()
        with torch.no_grad():
            for view in views:
                moved = view(module, moved)
        if moved is held:
            continue
        folded[name] = nn.Parameter(moved.clone(), requires_grad=value.requires_grad)
        # Marks such as mamba_ssm's _no_weight_decay.
        vars(folded[name]).update(vars(value))
    # In one step: an interrupt leaves all of what was added, or none.
    read = vars(module).get(_READ, {})
    vars(module)["_parameters"] = {n: p for n, p in folded.items() if n not in read}


def read_viewed(module: nn.Module, upstream: Callable[..., Any], name: str) -> Any:
    """``__getattr__`` of a module with views."""
    own = vars(module)
    aside = own.get(_SET_ASIDE, {})
    value = aside[name] if name in aside else upstream(module, name)
    views = own.get(_VIEWS, {}).get(name, ())
    if not views or value is None or own.get(OFFSETS_OFF):
        return value
    for view in views:
        value = view(module, value)
    return value


def apply_keeping_wide(
    module: nn.Module,
    upstream: Callable[..., nn.Module],
    fn: Callable[[Tensor], Tensor],
    recurse: bool = True,
) -> nn.Module:
    """``_apply`` of a module with added tensors: a cast leaves them in fp32, or wider."""
    kept: dict[int, Tensor] = {}
    for name, parameter in module._parameters.items():
        if name.startswith(BESIDE) and parameter is not None:
            kept |= {id(t): t for t in (parameter, parameter.grad) if t is not None}
    widened = never_narrower(fn, torch.float32)
    return upstream(module, lambda t: widened(t) if id(t) in kept else fn(t), recurse)


def additions_of(handles: Iterable[object]) -> list[Addition]:
    """Return the additions among what undoes an adapter."""
    return [handle for handle in handles if isinstance(handle, Addition)]
