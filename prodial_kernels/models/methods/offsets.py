"""State-space parameters trained beside the projectors, as offsets from their pretrained values.

A_log, D, the bias of the step size and the convolution are no matrices that a low-rank adapter
would fit. Each that trains gets an fp32 offset of its own shape, 0 at first, and whoever reads the
parameter as an attribute, as every path of every mixer does, gets pretrained + offset, in the
parameter's dtype. The pretrained value stays as it is: weight decay pulls towards it, the base
model is recognised by it, and removing the adapter restores it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from prodial_kernels.config import SSM_PARTS
from prodial_kernels.linear import OFFSET
from prodial_kernels.methods import Method
from prodial_kernels.models.methods.base import Addition, added, zeros_beside
from prodial_kernels.models.placements import is_mixer
from prodial_kernels.module_tree import module_paths

# What the parts are called in a mixer: mamba_ssm's, Vim's second direction, Zamba's.
_NAMES = {
    "A_log": ("A_log", "A_b_log"),
    "D": ("D", "D_b"),
    "dt_bias": ("dt_bias", "dt_proj.bias", "dt_proj_b.bias", "dt_proj_bias"),
}


@dataclass(frozen=True)
class SsmParameter:
    """A parameter of a mixer's recurrence.

    Attributes:
        path: Its dotted path in the plain model.
        owner: The module that holds it: the mixer, or a child of it.
        name: Its name in ``owner``.
        part: Which of :data:`~prodial_kernels.config.SSM_PARTS` it belongs to.
    """

    path: str
    owner: nn.Module
    name: str
    part: str

    @property
    def value(self) -> nn.Parameter:
        """The pretrained parameter."""
        parameter = self.owner._parameters[self.name]
        if parameter is None:
            raise AttributeError(f"{self.path} is gone")
        return parameter


def ssm_parameters(model: nn.Module, parts: Iterable[str] = SSM_PARTS) -> list[SsmParameter]:
    """Return the parameters of every mixer that belong to ``parts``, each once."""
    parts = list(parts)
    return [
        parameter
        for module, paths in {model: ("",), **module_paths(model)}.items()
        if is_mixer(module)
        for parameter in _of_mixer(module, paths[0])
        if parameter.part in parts
    ]


def find_ssm(model: nn.Module, parts: Sequence[str]) -> list[SsmParameter]:
    """Return :func:`ssm_parameters` for ``ProdialConfig.train_ssm``.

    ValueError for a part that no mixer of ``model`` has.
    """
    found = ssm_parameters(model, SSM_PARTS if "all" in parts else parts)
    had = {parameter.part for parameter in found}
    missing = [part for part in parts if (part not in had if part != "all" else not had)]
    if missing:
        there = list(dict.fromkeys(parameter.part for parameter in ssm_parameters(model)))
        raise ValueError(
            f"train_ssm={missing[0]!r} is in no mixer of this model; its mixers have "
            f"{', '.join(there) or 'none of ' + ', '.join(SSM_PARTS)}"
        )
    return found


def _of_mixer(mixer: nn.Module, path: str) -> Iterator[SsmParameter]:
    prefix = f"{path}." if path else ""
    candidates = [(name, part) for part, names in _NAMES.items() for name in names]
    candidates += [
        (f"{child}.{name}", "conv1d")
        for child, module in mixer.named_children()
        if isinstance(module, nn.Conv1d)
        for name in ("weight", "bias")
    ]
    for dotted, part in candidates:
        child, _, name = dotted.rpartition(".")
        owner: Any = mixer._modules.get(child) if child else mixer
        # The bias of an adapted layer is that of the layer inside.
        owner = getattr(owner, "base_layer", owner)
        parameter = None if owner is None else owner._parameters.get(name)
        if parameter is not None and parameter.is_floating_point():
            yield SsmParameter(prefix + dotted, owner, name, part)


@dataclass(frozen=True)
class Moved:
    """View of a parameter with an offset: their sum, in the parameter's dtype."""

    name: str

    def __call__(self, module: nn.Module, value: Any) -> Any:
        """``value`` with the offset added."""
        offset = added(module, OFFSET + self.name)
        return value if offset is None else (value + offset).to(value.dtype)


class Offsets(Addition):
    """The offsets of one module's parameters, until :meth:`remove`."""

    def __init__(
        self, module: nn.Module, names: Iterable[str], method: Method | None = None
    ) -> None:
        """Give the module's own parameters called ``names`` offsets of 0."""
        moved = tuple(names)
        values: dict[str, Any] = {name: module._parameters[name] for name in moved}
        tensors = {OFFSET + n: zeros_beside(value, *value.shape) for n, value in values.items()}
        super().__init__(module, method, tensors, views={name: Moved(name) for name in moved})


def make_offsets(parameters: Iterable[SsmParameter], method: Method | None = None) -> list[Offsets]:
    """Give ``parameters`` offsets; return what undoes it, one per module."""
    names: dict[nn.Module, list[str]] = {}
    for parameter in parameters:
        names.setdefault(parameter.owner, []).append(parameter.name)
    return [Offsets(owner, own, method) for owner, own in names.items()]
