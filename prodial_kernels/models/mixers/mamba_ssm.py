"""Which path an adapted mixer of mamba_ssm takes.

* ``Mamba`` multiplies by ``in_proj.weight`` in every path and by ``out_proj.weight`` in the fused
  one. Its fused path is :mod:`prodial_kernels.models.mixers.mamba1_block`; any other (generation,
  ``use_fast_path=False``) is upstream's own, on a proxy of the mixer whose projectors are called.
* ``Mamba2`` and ``Mamba2Simple`` bypass ``out_proj`` in the fused path only. There upstream's
  forward runs with its fused function replaced, for this call, by
  :mod:`prodial_kernels.models.mixers.mamba2_scan`.
* ``Mamba3`` calls its projectors.

mamba_ssm is recognised by structure and never imported here. Where a release's code is not what
these paths rely on, a warning says so, and upstream's own path runs with its projectors called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prodial_kernels import upstream as libraries
from prodial_kernels.linear import ProdialLinear, forget_decoding_graphs
from prodial_kernels.models.mixers.arguments import cache_among, named_arguments, split_first
from prodial_kernels.models.mixers.branch import branch_of
from prodial_kernels.models.mixers.cuda_functions import kernels_available
from prodial_kernels.models.mixers.inserted.tokens import inserted_tokens
from prodial_kernels.models.mixers.inserted.upstream import with_inserted
from prodial_kernels.models.mixers.mamba1_block import (
    KEEP_OUTPUT,
    MAMBA_PARTS,
    RECOMPUTE_XZ,
    fused_mamba,
)
from prodial_kernels.models.mixers.mamba2_scan import Keeping, difference, scan_and_project
from prodial_kernels.models.mixers.projection import (
    NoProjection,
    calling_projectors,
    is_changed,
    is_explicit,
    operands_of,
)
from prodial_kernels.models.mixers.recomputed_norm import norm_recomputation
from prodial_kernels.models.mixers.structure import forward_of, global_of, names_in, unknown_in
from prodial_kernels.models.patch_point import AdaptedMixer, Policy, Undo, View, rebound
from prodial_kernels.ops.function import differentiable_projection
from prodial_kernels.ops.operators import scaled_weight
from prodial_kernels.ops.prefetch import Prefetch
from prodial_kernels.ops.projection import can_prefetch

Method = Any
# in_proj's input and s ⊙ W.
_Prepared = tuple[Tensor, Tensor]

# For each family: the fused function in its forward's code, and attributes its paths rely on.
_MAMBA = ("mamba_inner_fn", MAMBA_PARTS)
_MAMBA2 = ("mamba_split_conv1d_scan_combined", ("in_proj", "out_proj", "use_mem_eff_path"))


def recognises(mixer: nn.Module) -> bool:
    """Whether ``mixer`` is one of mamba_ssm's, by class name and by what its forward does."""
    return _kind(mixer) is not None


def inserts(mixer: nn.Module) -> bool:
    """Whether tokens can be inserted into ``mixer`` (:mod:`.inserted.tokens`): if not Mamba-3's."""
    return _kind(mixer) not in (None, "Mamba3")


def check(mixer: nn.Module, targets: frozenset[str]) -> None:
    """Refuse what cannot be adapted.

    Raises:
        ValueError: A mixer sharded over a process group: its fused path reduces what the
            projector would have to be called on before.
    """
    if _kind(mixer) == "Mamba2" and getattr(mixer, "process_group", None) is not None:
        raise ValueError(
            f"{sorted(targets)} of a {type(mixer).__name__} with process_group: tensor-parallel "
            "projectors cannot be adapted; build the model without process_group"
        )


def adapt_mixers(model: nn.Module) -> list[Undo]:
    """Give every mamba_ssm mixer of ``model`` in which something trains its path."""
    changes: list[Undo] = []
    for mixer in model.modules():
        kind = _kind(mixer)
        if kind is not None and is_changed(mixer):
            policies = dict(_POLICIES[kind])
            problem = _difference(mixer, kind)
            if problem is not None:
                libraries.warn("mamba_ssm", f"{kind}: {problem}: it runs on separate kernels")
                policies["forward"] = unfused
            changes.append(
                AdaptedMixer(
                    mixer, {n: policy for n, policy in policies.items() if hasattr(mixer, n)}
                )
            )
    return [*changes, ForgottenGraphs(model)] if changes else []


class ForgottenGraphs:
    """Drops the CUDA graphs of ``generate(cg=True)``, now and when adapters are removed.

    They would decode with the weights of the time when they were captured.
    """

    def __init__(self, model: nn.Module) -> None:
        """Drop them."""
        self.model = model
        self.remove()

    def remove(self) -> None:
        """Drop them again."""
        forget_decoding_graphs(self.model)


def mamba_forward(mixer: Any, upstream: Method, *args: Any, **kwargs: Any) -> Tensor:
    """``Mamba.forward``: [b, l, d] -> [b, l, d]; fused where the input is all that is given."""
    projections = (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
    if mixer.use_fast_path and kernels_available() and all(map(is_explicit, projections)):
        hidden, positional, named = split_first(upstream, args, kwargs)
        if all(given is None for given in (*positional, *named.values())):
            return fused_mamba(mixer, hidden)
    return unfused(mixer, upstream, *args, **kwargs)


def unfused(mixer: Any, upstream: Method, *args: Any, **kwargs: Any) -> Tensor:
    """Upstream's ``forward`` on separate kernels: its fused function would take W'."""
    view = calling_projectors(mixer, use_fast_path=False, use_mem_eff_path=False)
    return with_inserted(mixer, upstream, view, args, kwargs)


def mamba2_forward(mixer: Any, upstream: Method, *args: Any, **kwargs: Any) -> Tensor:
    """``Mamba2.forward`` and ``Mamba2Simple.forward``, fused where upstream is."""
    cached = cache_among(named_arguments(upstream, args, kwargs)) is not None
    if not mixer.use_mem_eff_path or cached:
        return with_inserted(mixer, upstream, calling_projectors(mixer), args, kwargs)
    if getattr(mixer, "d_ssm", mixer.d_inner) < mixer.d_inner:
        # The fused function without out_proj fails in its backward here (UnboundLocalError).
        view = View(mixer, use_mem_eff_path=False)
        return with_inserted(mixer, upstream, view, args, kwargs)
    in_proj = mixer.in_proj
    if inserted_tokens(mixer) is None:
        in_proj = _in_proj(mixer, split_first(upstream, args, kwargs)[0])
    view = View(mixer, in_proj=in_proj, out_proj=NoProjection())
    alone = is_explicit(mixer.out_proj) and branch_of(mixer.out_proj) is None
    if torch.compiler.is_compiling() or not alone:
        # torch.compile cannot trace a function that is made while it traces.
        return mixer.out_proj(with_inserted(mixer, upstream, view, args, kwargs))
    recomputed = in_proj if isinstance(in_proj, _RecomputedInput) else None
    keeping = Keeping(
        output=(recomputed is not None and not getattr(mixer, RECOMPUTE_XZ, False))
        or getattr(mixer, KEEP_OUTPUT, False),
        prefetch=None if recomputed is None else recomputed.prefetch,
    )
    fused = partial(scan_and_project, global_of(upstream, _MAMBA2[0]), mixer.out_proj, keeping)
    run = rebound(upstream, **{_MAMBA2[0]: fused})
    return with_inserted(mixer, upstream, view, args, kwargs, run)


def viewed(mixer: Any, upstream: Method, *args: Any, **kwargs: Any) -> Any:
    """Upstream's method with projectors that are called instead of multiplied by their weights."""
    return upstream(calling_projectors(mixer), *args, **kwargs)


_STATES = "_get_states_from_cache"
_CACHE: dict[str, Policy] = {"allocate_inference_cache": viewed, _STATES: viewed}
_POLICIES: dict[str, dict[str, Policy]] = {
    "Mamba": {"forward": mamba_forward, "step": viewed, **_CACHE},
    "Mamba2": {"forward": mamba2_forward, **_CACHE},
    "Mamba2Simple": {"forward": mamba2_forward},
    "Mamba3": _CACHE,
}


def _in_proj(mixer: Any, u: Tensor) -> nn.Module | _RecomputedInput:
    """Return ``in_proj``, or one that does not keep its input where it can be recomputed."""
    layer = mixer.in_proj
    # Hooks run in calls of the module only.
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    if isinstance(layer, ProdialLinear) and is_explicit(layer) and not hooked:
        again = norm_recomputation(u)
        if again is not None:
            return _RecomputedInput(layer, again)
    return layer


class _RecomputedInput:
    """An adapted ``in_proj`` whose input is recomputed in backward."""

    def __init__(self, layer: ProdialLinear, again: Callable[[], Tensor]) -> None:
        self.layer, self.again = layer, again
        self._prepare: Callable[[], Prefetch[_Prepared]] | None = None
        self._prepared: Prefetch[_Prepared] | None = None

    def __call__(self, u: Tensor) -> Tensor:
        operands, options = operands_of(self.layer, u)
        trains = any(part is not None and part.requires_grad for part in operands[1:])
        if trains and can_prefetch(operands, options):
            # Holds no reference to this object, which would keep the graph until it is collected.
            again, device = self.again, u.device
            self._prepare = lambda: Prefetch(device, lambda: (again(), scaled_weight(operands)))
        return differentiable_projection(u, operands, options, recomputed=self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def prefetch(self) -> Prefetch[_Prepared] | None:
        """Prepare to prefetch its backward's first operands; None if there is nothing to gain."""
        self._prepared = None if self._prepare is None else self._prepare()
        return self._prepared

    def take(self) -> tuple[Tensor, Tensor | None]:
        """Return the input, and s ⊙ W where it was prefetched."""
        if self._prepared is None:
            return self.again(), None
        made, self._prepared = self._prepared.take(), None
        return made


def _kind(mixer: nn.Module) -> str | None:
    """Return the name of the mixer's mamba_ssm class; None if a subclass overrides forward."""
    for cls in type(mixer).__mro__:
        if "forward" not in vars(cls):
            continue
        function, attributes = _MAMBA if cls.__name__ == "Mamba" else _MAMBA2
        if cls.__name__ == "Mamba3":
            calls = cls.__module__.startswith("mamba_ssm.")
        else:
            calls = function in names_in(vars(cls)["forward"])
        if (
            calls
            and cls.__name__ in _POLICIES
            # Vim's fork of Mamba scans both ways.
            and not hasattr(mixer, "bimamba_type")
            and (cls.__name__ == "Mamba3" or all(hasattr(mixer, name) for name in attributes))
        ):
            return cls.__name__
        return None
    return None


def _difference(mixer: nn.Module, kind: str) -> str | None:
    """Say how the mixer's forward differs from what its policy assumes, or return None."""
    _, forward = forward_of(mixer)
    if kind == "Mamba":
        return unknown_in(mixer, forward, parts=MAMBA_PARTS, known=("act", "step", _STATES))
    if kind == "Mamba3":
        return None
    return difference(global_of(forward, _MAMBA2[0]))
