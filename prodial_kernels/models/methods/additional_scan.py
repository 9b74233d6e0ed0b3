"""Additional-scan: where the new state dimensions go, and what their parts are read from.

The fused kernels, and every other path, run with N + k states: they read A_log with k more columns
and ``x_proj.weight`` with 2k more rows, and the sizes that a mixer splits by are read from these.
The pretrained columns and rows are the module's own, so that the pretrained states follow the
pretrained recurrence at every step. Both weights are small: 1 to 3 % of ``in_proj``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prodial_kernels.methods import AdditionalScan
from prodial_kernels.models.methods.base import (
    ADDED,
    Addition,
    Site,
    View,
    added,
    pretrained,
    wide_like,
    zeros_beside,
)
from prodial_kernels.models.methods.mixer_parts import ScanParts, mixers_of, scans_of

_B, _C = f"{ADDED}scan_B", f"{ADDED}scan_C"
# What mixers call the number of states that they split by.
_SIZES = ("d_state", "ssm_state_size")
# What configurations call it.
_OPTIONS = ("state_size", "mamba_d_state")


@dataclass(frozen=True)
class MoreColumns:
    """View of A_log [E, N]: [E, N + k].

    Attributes:
        name: A_log's name in the mixer.
        method: The method.
    """

    name: str
    method: AdditionalScan

    @property
    def tensor(self) -> str:
        """The name of the new columns' offset, [E, k]."""
        return f"{ADDED}scan_{self.name}"

    def __call__(self, module: nn.Module, value: Any) -> Any:
        """``value`` and the new columns."""
        offset = added(module, self.tensor)
        if offset is None:
            return value
        own = pretrained(module, self.name).to(wide_like(value))
        states, k = own.shape[1], self.method.states
        if self.method.init == "s4d":
            numbers = torch.arange(states + 1, states + k + 1, device=own.device, dtype=own.dtype)
            begin = numbers.log().expand(len(own), k)
        else:
            begin = own[:, neighbours(self.method, states)]
        return _joined(self.method.position, value, (begin + offset).to(value.dtype), dim=1)


@dataclass(frozen=True)
class MoreRows:
    """View of ``x_proj.weight`` [dt_rank + 2N, E]: [dt_rank + 2N + 2k, E].

    Attributes:
        method: The method.
        scan: What the rows are.
    """

    method: AdditionalScan
    scan: ScanParts

    def __call__(self, module: nn.Module, value: Any) -> Any:
        """``value`` with new rows beside those of B, and beside those of C."""
        b, c = added(module, _B), added(module, _C)
        if b is None or c is None:
            return value
        rank, states = self.scan.dt_rank, self.scan.states
        dt, own_b, own_c = value.split([rank, states, states])
        begin = pretrained(module, "weight")[rank : rank + states].to(wide_like(value))
        new_b = (begin[neighbours(self.method, states)] + b).to(value.dtype)
        position = self.method.position
        rows = (_joined(position, own_b, new_b), _joined(position, own_c, c.to(value.dtype)))
        return torch.cat((dt, *rows))


@dataclass(frozen=True)
class SizeOf:
    """View of a size: that of a parameter as it is read now.

    Attributes:
        name: The parameter's name.
        dim: Which of its sizes.
    """

    name: str
    dim: int

    def __call__(self, module: nn.Module, value: Any) -> Any:
        """The size."""
        return getattr(module, self.name).shape[self.dim]


def neighbours(method: AdditionalScan, states: int) -> slice:
    """Return the pretrained states that new ones begin as: the last ones, or the first.

    With more new states than there are (``init="s4d"``), :func:`additional_scan_sites` refuses.
    """
    k = method.states
    return slice(0, k) if method.position == "prefix" else slice(states - k, states)


def _joined(position: str, own: Tensor, new: Tensor, dim: int = 0) -> Tensor:
    return torch.cat((new, own) if position == "prefix" else (own, new), dim)


class WiderScan(Addition):
    """New columns of a mixer's A_log, in the mixer."""

    def __init__(self, mixer: nn.Module, method: AdditionalScan, scans: list[ScanParts]) -> None:
        """Add them, and let the mixer split by the new size."""
        views: dict[str, View] = {}
        tensors: dict[str, Tensor] = {}
        for scan in scans:
            value: Any = mixer._parameters[scan.A_log]
            view = MoreColumns(scan.A_log, method)
            views[scan.A_log] = view
            tensors[view.tensor] = zeros_beside(value, value.shape[0], method.states)
        sizes = [name for name in _SIZES if name in vars(mixer)]
        views |= dict.fromkeys(sizes, SizeOf(scans[0].A_log, 1))
        super().__init__(mixer, method, tensors, views=views)


class WiderProjection(Addition):
    """New rows of an ``x_proj``, in that layer."""

    def __init__(self, layer: nn.Linear, method: AdditionalScan, scan: ScanParts) -> None:
        """Add them."""
        value: Any = layer._parameters["weight"]
        new = (method.states, layer.in_features)
        super().__init__(
            layer, method, {_B: zeros_beside(value, *new), _C: zeros_beside(value, *new)},
            views={"weight": MoreRows(method, scan), "out_features": SizeOf("weight", 0)},
        )  # fmt: skip


class WiderConfiguration(Addition):
    """The number of states in the configuration of a merged model."""

    def __init__(self, model: nn.Module, method: AdditionalScan, states: int) -> None:
        """Note it; nothing changes before :meth:`fold`."""
        super().__init__(model, method, {})
        self.states = states

    def fold(self) -> None:
        """Let the model's configuration say how many states its mixers have."""
        config: Any = getattr(self.module, "config", None)
        for name in _OPTIONS:
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, self.states)
        options = getattr(config, "ssm_cfg", None)
        if isinstance(options, dict):
            options["d_state"] = self.states


def additional_scan_sites(model: nn.Module, method: AdditionalScan) -> list[Site]:
    """Plan the new states; ValueError for mixers that cannot have them."""
    sites: list[Site] = []
    total = 0
    for path, mixer in mixers_of(model):
        scans = scans_of(mixer)
        _check(path, mixer, scans, method)
        shapes: dict[str, tuple[int, ...]] = {}
        for scan in scans:
            view = MoreColumns(scan.A_log, method)
            value: Any = mixer._parameters[scan.A_log]
            shapes[view.tensor] = (value.shape[0], method.states)
        sites.append(Site(path, shapes, partial(WiderScan, mixer, method, scans)))
        for scan in scans:
            layer: Any = mixer._modules[scan.x_proj]
            new: Mapping[str, tuple[int, ...]] = dict.fromkeys(
                (_B, _C), (method.states, layer.in_features)
            )
            where = f"{path}.{scan.x_proj}" if path else scan.x_proj
            sites.append(
                Site(where, new, partial(WiderProjection, layer, method, scan), plain=True)
            )
            total = scan.states + method.states
    if not sites:
        raise ValueError("additional-scan: this model has no mixer with a selective scan")
    return [*sites, Site("", {}, partial(WiderConfiguration, model, method, total))]


def _check(path: str, mixer: nn.Module, scans: list[ScanParts], method: AdditionalScan) -> None:
    kind = f"{path or 'the model'}, a {type(mixer).__name__},"
    if not scans:
        raise ValueError(
            f"additional-scan: {kind} is no Mamba-1 mixer with A_log [E, N] and an x_proj that "
            "gives B and C: Mamba-2's B and C come out of in_proj through its convolution. Use "
            "partial-tuning or LoRA there"
        )
    if hasattr(mixer, "b_layernorm"):
        raise ValueError(
            f"additional-scan: {kind} norms B and C over all states, so that new ones would change "
            "the pretrained ones; use partial-tuning or LoRA there"
        )
    for scan in scans:
        layer = mixer._modules[scan.x_proj]
        weight = layer._parameters.get("weight") if isinstance(layer, nn.Linear) else None
        if type(weight) is not nn.Parameter:
            raise ValueError(
                f"additional-scan: {scan.x_proj} of {kind} is a {type(layer).__name__} without a "
                "dense weight of its own; leave it dense when the model is quantised"
            )
        if method.states > scan.states:
            raise ValueError(
                f"additional-scan: states={method.states} is more than the {scan.states} states of "
                f"{kind} whose B rows new ones begin as, and equal copies would stay equal; choose "
                f"at most {scan.states}"
            )
