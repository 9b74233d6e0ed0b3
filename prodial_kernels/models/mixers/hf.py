"""Mamba mixers of transformers (5.17 and later): adapters take effect, the fast path stays.

In training without a cache, eight of the ten mixer classes hand ``self.out_proj.weight`` to one
fused function and return its result, so ``out_proj`` is never called. An adapted mixer takes
one of these paths:

* Mamba-2 and its relatives run upstream's own ``forward`` on a proxy of the mixer whose
  ``out_proj`` has no weight: the fused function then stops before the projection. Where it is
  mamba-ssm's, :mod:`prodial_kernels.models.mixers.mamba2_scan` replaces it for this call, so that
  the projector's input is not kept; after any other (a hub kernel) the projector is called.
  Without mamba-ssm, the same forward calls the projector itself.
* ``mamba`` runs the block of :mod:`prodial_kernels.models.mixers.mamba1_block`.
* Where the fused function is unusable (``falcon_mamba``: its backward leaves out the Jacobian of
  the B, C and dt norms) or computes something else than evaluation (``falcon_h1`` with a norm
  before the gate; several groups, in releases that norm them together), upstream's ``forward``
  runs on a proxy with ``training=False``, which ``forward`` reads only to choose its path: separate
  convolution and scan kernels.

The assumptions of these paths are checked against upstream's code when adapters are applied. A
release that differs gives a warning and takes a path that is right for it, or an error.

transformers is recognised by module names and never imported here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prodial_kernels import upstream as libraries
from prodial_kernels.models.mixers.arguments import mask_among, named_arguments, parameters_of
from prodial_kernels.models.mixers.branch import branch_of
from prodial_kernels.models.mixers.cuda_functions import kernels_available
from prodial_kernels.models.mixers.inserted.tokens import AFFIX, inserted_tokens
from prodial_kernels.models.mixers.inserted.upstream import with_inserted
from prodial_kernels.models.mixers.mamba1_block import KEEP_OUTPUT, MAMBA_PARTS, fused_mamba
from prodial_kernels.models.mixers.mamba2_scan import Keeping, difference, scan_and_project
from prodial_kernels.models.mixers.projection import (
    NoProjection,
    adapted_children,
    is_changed,
    is_explicit,
)
from prodial_kernels.models.mixers.structure import (
    forward_of,
    global_of,
    names_in,
    times_read,
    unknown_in,
    weight_reads,
)
from prodial_kernels.models.patch_point import AdaptedMixer, Policy, View, rebound

FUSED_S6 = "mamba_inner_fn"
FUSED_SSD = "mamba2_split_conv1d_scan_combined"
"""Names of the fused training functions, globals of transformers' modeling modules."""

_OF_MAMBA_SSM = "mamba_split_conv1d_scan_combined"
"""What mamba_ssm calls the second of them."""

MASK_PADDING = "apply_mask_to_padding_states"
"""Name of the function that sets padding to 0 before the projector, a global there as well."""

Forward = Callable[..., Any]


def recognises(module: nn.Module) -> bool:
    """Whether ``module`` runs a forward of transformers'.

    Those that call no fused function call their projectors, and are left alone. Code that a
    checkpoint brings along is not transformers'.
    """
    return forward_of(module)[0].__module__.startswith("transformers.")


def check(mixer: nn.Module, targets: frozenset[str]) -> None:
    """Refuse nothing: whatever is adapted in these modules takes effect.

    Warns of a forward that reads a projector's weight for an unknown function: there the adapted
    weight is formed in every step.
    """
    if fused_function(mixer) is None:
        for method, name in weight_reads(type(mixer), targets & {"in_proj", "out_proj"}):
            libraries.warn(
                "transformers",
                f"{type(mixer).__name__}.{method}() reads {name}.weight for a function that is "
                "unknown, so the adapted weight will be formed in every step, which is slow",
            )


def adapt_mixers(model: nn.Module) -> list[AdaptedMixer]:
    """Give every mixer of ``model`` in which something trains its path.

    FalconMamba's mixers, and those whose evaluation norms groups together, never take the fused
    function, not even without an adapter of their own: its gradient would reach the adapters of
    earlier layers.

    Returns:
        What undoes it, one per changed mixer.
    """
    chosen = [(mixer, _policy_of(mixer)) for mixer in model.modules()]
    return [AdaptedMixer(mixer, {"forward": policy}) for mixer, policy in chosen if policy]


def fused_function(mixer: nn.Module) -> str | None:
    """Return the name of the fused function that the mixer's ``forward`` calls, if any."""
    found = _fused_forward(mixer)
    return None if found is None else found[1]


def _fused_forward(mixer: nn.Module) -> tuple[Forward, str] | None:
    """Return transformers' ``forward`` of the mixer and the fused function it calls, if any."""
    for cls in type(mixer).__mro__:
        if cls.__module__.startswith("transformers.models.") and "forward" in vars(cls):
            forward = vars(cls)["forward"]
            # The policies replace out_proj and training in what this forward sees.
            for name in (FUSED_S6, FUSED_SSD):
                if {"out_proj", "training", name} <= names_in(forward):
                    return forward, name
    return None


def unfused_forward(mixer: nn.Module, upstream: Forward, *args: Any, **kwargs: Any) -> Any:
    """Run the path that evaluation takes: separate kernels, projectors called as modules."""
    return with_inserted(mixer, upstream, View(mixer, training=False), args, kwargs)


def ssd_forward(mixer: nn.Module, upstream: Forward, *args: Any, **kwargs: Any) -> Any:
    """Run upstream's choice of path, with ``out_proj`` taken out of the fused function."""
    projector = _DeferredProjector(mixer.get_submodule("out_proj"))
    view = View(mixer, out_proj=projector)
    fused = _of_mamba_ssm(upstream)
    # accelerate moves the children's weights, which only a call of the module triggers.
    offloaded = any(hasattr(child, "_hf_hook") for child in mixer.children())
    alone = is_explicit(projector.projector) and branch_of(projector.projector) is None
    if fused is not None and alone and not offloaded:
        keeping = Keeping(output=getattr(mixer, KEEP_OUTPUT, False))
        replaced = partial(_scan_and_project, fused, projector.projector, keeping)
        run = rebound(upstream, **{FUSED_SSD: replaced})
        return with_inserted(mixer, upstream, view, args, kwargs, run)
    output = with_inserted(mixer, upstream, view, args, kwargs)
    if projector.called:
        return output
    features = projector.projector.in_features
    if not isinstance(output, Tensor) or output.shape[-1] != features:
        raise libraries.error(
            "transformers",
            f"{type(mixer).__name__} without out_proj does not return the {features} features "
            "that out_proj takes",
        )
    return projector(output)


def mamba_forward(mixer: nn.Module, upstream: Forward, *args: Any, **kwargs: Any) -> Any:
    """``MambaMixer.forward``: fused where upstream is, that is in training without a cache."""
    projections = map(mixer.get_submodule, ("in_proj", "x_proj", "dt_proj", "out_proj"))
    if (
        mixer.training
        and mixer.activation in ("silu", "swish")
        and kernels_available()
        and all(map(is_explicit, projections))
    ):
        hidden = _masked_input(mixer, upstream, args, kwargs)
        if hidden is not None:
            return fused_mamba(mixer, hidden)
    return unfused_forward(mixer, upstream, *args, **kwargs)


def _masked_input(
    mixer: nn.Module, upstream: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """Return the input with padding set to 0; None if more than it and a mask is given.

    None too where a mixer that inserts tokens gets padding on the left.
    """
    arguments = named_arguments(upstream, args, kwargs)
    given = {name: v for name, v in arguments.items() if v is not None and v is not False}
    hidden = given.pop(next(iter(parameters_of(upstream)), ""), None)
    mask = given.pop(mask_among(given) or "", None)
    mask_padding = global_of(upstream, MASK_PADDING)
    if hidden is None or given:
        return None
    if mask is None:
        return hidden
    if inserted_tokens(mixer) is not None and not bool(mask[:, 0].all()):
        # Padding on the left would stand between the tokens and the text.
        return None
    return None if mask_padding is None else mask_padding(hidden, mask)


def _policy_of(mixer: nn.Module) -> Policy | None:
    found = _fused_forward(mixer)
    if found is None:
        return None
    forward, fused = found
    if hasattr(mixer, "b_layernorm"):
        return _evaluated(mixer, forward)
    if _norms_groups_together(mixer):
        return _evaluated(mixer, forward)
    if not is_changed(mixer):
        return None
    adapted = adapted_children(mixer)
    if fused == FUSED_S6:
        problem = unknown_in(mixer, forward, parts=MAMBA_PARTS, known=("act",))
        if problem is None and global_of(forward, MASK_PADDING) is None:
            problem = f"beside it is no {MASK_PADDING}()"
        if problem is None:
            return mamba_forward
        _warn(mixer, f"{problem}: it trains on separate kernels")
        return _evaluated(mixer, forward)
    if getattr(getattr(mixer, "norm", None), "norm_before_gate", False):
        # Upstream hard-codes "gate, then norm" in the fused call; FalconH1's module obeys its
        # configuration, whose default is "norm, then gate".
        return _evaluated(mixer, forward)
    out_proj = mixer._modules.get("out_proj")
    beside = out_proj is not None and branch_of(out_proj) is not None
    if "out_proj" in adapted or beside or AFFIX in vars(mixer):
        return ssd_forward
    return None


def _norms_groups_together(mixer: nn.Module) -> bool:
    """Whether evaluation takes one norm over all groups, where mamba_ssm's fused call takes each.

    So do mamba2, bamba and granitemoehybrid with several groups up to transformers 5.21: what they
    train on the kernels is not what they evaluate.
    """
    norm = getattr(mixer, "norm", None)
    grouped = any(hasattr(norm, name) for name in ("group_size", "n_groups"))
    return getattr(mixer, "n_groups", 1) > 1 and norm is not None and not grouped


def _evaluated(mixer: nn.Module, forward: Forward) -> Policy:
    """:func:`unfused_forward`; warns unless ``training`` chooses the path and nothing else."""
    reads = times_read(forward, "training")
    if reads != 1:
        _warn(mixer, f"its forward reads self.training {reads} times, and once is known")
    return unfused_forward


def _warn(mixer: nn.Module, problem: str) -> None:
    libraries.warn("transformers", f"{type(mixer).__name__}: {problem}")


def _of_mamba_ssm(upstream: Forward) -> Callable[..., Tensor] | None:
    """mamba-ssm's fused function, if that is what transformers calls now; looked up every time."""
    if torch.compiler.is_compiling():
        return None
    found = global_of(upstream, FUSED_SSD)
    for cell in getattr(found, "__closure__", None) or ():
        function = cell.cell_contents
        if getattr(function, "__name__", None) == _OF_MAMBA_SSM:
            problem = difference(function)
            if problem is None:
                return function
            libraries.warn("mamba_ssm", f"{problem}: out_proj keeps its input for backward")
    return None


def _scan_and_project(
    fused: Callable[..., Tensor], projector: Any, keeping: Keeping, *args: Any, **kwargs: Any
) -> Tensor:
    # As transformers does, leave out what this version of the function does not know.
    known = inspect.signature(fused).parameters
    kwargs = {name: value for name, value in kwargs.items() if name in known}
    return scan_and_project(fused, projector, keeping, *args, **kwargs)


class _DeferredProjector(NoProjection):
    """An ``out_proj`` that notes whether upstream has called it."""

    def __init__(self, projector: nn.Module) -> None:
        self.projector = projector
        self.called = False

    def __call__(self, x: Tensor) -> Tensor:
        self.called = True
        return self.projector(x)

    def __getattr__(self, name: str) -> Any:
        if name in ("in_features", "out_features", "training"):
            return getattr(self.projector, name)
        raise AttributeError(
            f"a mixer asked out_proj for {name!r} in training; "
            f"{libraries.tested_with('transformers')}"
        )
