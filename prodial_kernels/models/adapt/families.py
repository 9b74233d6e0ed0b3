"""The known families of mixers, and the refusal of modules that would bypass an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from prodial_kernels import upstream
from prodial_kernels.models.adapt.foreign_bases import dtype_between_layers
from prodial_kernels.models.adapt.targets import Target
from prodial_kernels.models.layers.packed_rows import guard_packed_rows
from prodial_kernels.models.layers.read_weights import own_read_weights
from prodial_kernels.models.mixers import hf, mamba_ssm, vim
from prodial_kernels.models.mixers.structure import weight_reads
from prodial_kernels.models.patch_point import Undo


@dataclass(frozen=True)
class Family:
    """The interface of a family of mixers; each is one file of ``models/mixers``.

    Attributes:
        recognises: Whether a module is a mixer of this family.
        check: Called with a recognised mixer and the names of its children that are to be
            adapted, before anything changes; raises ValueError to refuse.
        adapt: Called with the model once its layers are adapted; returns what undoes it.
    """

    recognises: Callable[[nn.Module], bool]
    check: Callable[[nn.Module, frozenset[str]], None]
    adapt: Callable[[nn.Module], Iterable[Undo]]


FAMILIES: tuple[Family, ...] = (
    Family(mamba_ssm.recognises, mamba_ssm.check, mamba_ssm.adapt_mixers),
    Family(hf.recognises, hf.check, hf.adapt_mixers),
    Family(vim.recognises, vim.check, vim.adapt_mixers),
)


def check_mixers(model: nn.Module, targets: Iterable[Target]) -> None:
    """Refuse, before anything changes, targets whose adapter would have no effect or be slow.

    Raises:
        ValueError: A known mixer that cannot be adapted as asked, or an unknown module that
            multiplies by a target's ``weight`` instead of calling it.
    """
    names: dict[str, set[str]] = {}
    for target in targets:
        for path in target.paths:
            parent, _, name = path.rpartition(".")
            names.setdefault(parent, set()).add(name)
    for path, children in names.items():
        parent_module = model.get_submodule(path)
        known = [family for family in FAMILIES if family.recognises(parent_module)]
        for family in known:
            family.check(parent_module, frozenset(children))
        if known:
            continue
        for method, name in weight_reads(type(parent_module), children):
            raise ValueError(
                f"{path or 'the model'}, a {type(parent_module).__module__}."
                f"{type(parent_module).__qualname__}, reads {name}.weight in {method}() instead "
                f"of calling {name}: an adapter would act through an adapted weight formed at "
                "every read, or not at all. Take it out of target_modules, or call the module "
                f"in a subclass: self.{name}(x)" + _release(type(parent_module))
            )


def _release(cls: type[nn.Module]) -> str:
    library = upstream.library_of(cls)
    return "" if library is None else f" ({upstream.tested_with(library)})"


def adapt_mixers(model: nn.Module) -> list[Undo]:
    """Let every known mixer call its adapted projectors; return what undoes it.

    Quantised layers of other libraries whose weight a mixer reads are read as this package's own.
    Rows of several documents that the model would mix up are refused from then on.
    """
    # Before a family looks at what its mixers consist of.
    read = own_read_weights(model, dtype_between_layers(model))
    mixers = [undo for family in FAMILIES for undo in family.adapt(model)]
    return [*read, *mixers, *guard_packed_rows(model)]
