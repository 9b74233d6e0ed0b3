"""fp32 masters of 16-bit parameters that are trained as they are, beside the adapter.

A module's parameter becomes fp32 in place, under its own name; whoever reads it as an attribute,
as every forward does, gets it in the dtype that it had. An optimiser's small steps are thus kept,
and what the model computes, and in which dtype, stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prodial_kernels.linear import never_narrower
from prodial_kernels.models.patch_point import AdaptedMixer, Policy

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
# Attribute of a module: the dtype in which each of its masters is read, by the parameter's name.
_READ_AS = "_prodial_read_as"


class Masters:
    """The fp32 masters of one module, until :meth:`remove`."""

    def __init__(self, module: nn.Module, read_as: Mapping[str, torch.dtype]) -> None:
        """Make masters of the module's own parameters: by name, the dtype to read each in."""
        self.module = module
        vars(module)[_READ_AS] = dict(read_as)
        for name in read_as:
            _cast(module, name, torch.float32)
        policies: dict[str, Policy] = {"__getattr__": read_rounded, "_apply": apply_keeping_masters}
        self._class = AdaptedMixer(module, policies)

    def remove(self) -> None:
        """Round the parameters to the dtype that they are read in."""
        self._class.remove()
        for name, dtype in vars(self.module).pop(_READ_AS, {}).items():
            _cast(self.module, name, dtype)


def make_masters(model: nn.Module, parameters: Iterable[nn.Parameter]) -> list[Masters]:
    """Make fp32 masters of those ``parameters`` that have 16 bits, wherever ``model`` holds them.

    Returns:
        What undoes it, one per changed module.
    """
    wanted = {id(p): p.dtype for p in parameters if p.dtype in _SIXTEEN_BITS}
    found = [
        (module, {n: wanted[id(p)] for n, p in module._parameters.items() if id(p) in wanted})
        for module in model.modules()
    ]
    return [Masters(module, read_as) for module, read_as in found if read_as]


def read_rounded(module: nn.Module, upstream: Callable[..., Any], name: str) -> Any:
    """``__getattr__`` of a module with masters: a parameter in the dtype it is read in."""
    value = upstream(module, name)
    dtype = vars(module).get(_READ_AS, {}).get(name)
    return value if dtype is None else value.to(dtype)


def apply_keeping_masters(
    module: nn.Module,
    upstream: Callable[..., nn.Module],
    fn: Callable[[Tensor], Tensor],
    recurse: bool = True,
) -> nn.Module:
    """``_apply`` of a module with masters: a cast changes the dtype they are read in alone."""
    read_as: dict[str, torch.dtype] = vars(module)[_READ_AS]
    kept: dict[int, Tensor] = {}
    for name, dtype in read_as.items():
        master = module._parameters[name]
        if master is None:
            continue
        kept |= {id(t): t for t in (master, master.grad) if t is not None}
        read_as[name] = fn(torch.empty(0, dtype=dtype, device=master.device)).dtype

    widened = never_narrower(fn, torch.float32)
    return upstream(module, lambda t: widened(t) if id(t) in kept else fn(t), recurse)


def _cast(module: nn.Module, name: str, dtype: torch.dtype) -> None:
    parameter = module._parameters[name]
    if parameter is not None and parameter.dtype != dtype:
        # A gradient of another dtype could not be added to.
        parameter.grad = None
        parameter.data = parameter.data.to(dtype)
