"""Several documents in one row: which models keep them apart, and a guard where one would leak.

Trainers pack: they put documents side by side and pass ``position_ids`` that begin again with each,
or ``seq_idx``, the number of the document that a token belongs to. A recurrence has to reset its
state there. Of transformers' families (5.17 to 5.24, on mamba_ssm's kernels) four do, given both
arguments, no attention mask and no cache; the others ignore what they are given and let the state
of one document run into the next, without a word. mamba_ssm's ``Mamba2`` resets by ``seq_idx``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prodial_kernels.models.mixers import hf, mamba_ssm
from prodial_kernels.models.mixers.arguments import cache_among
from prodial_kernels.models.mixers.cuda_functions import kernels_available

SEQ_IDX, POSITIONS = "seq_idx", "position_ids"

_APART = frozenset({"bamba", "falcon_h1", "nemotron_h", "zamba2"})
_LEAKING = frozenset({"mamba", "mamba2", "falcon_mamba", "jamba", "zamba", "granitemoehybrid"})
# Looking into a tensor on a GPU waits for it. What packs does so from its first batches on.
_LOOKS_ON_A_GPU = 16


def arguments_apart(model: nn.Module) -> frozenset[str]:
    """Return the arguments that keep the documents of a row apart in a model; empty if none do.

    Of models of transformers those of the families above, on a GPU with mamba_ssm's kernels (they
    raise without). Of mamba_ssm's, models of ``Mamba2`` layers alone.
    """
    kind = _kind(model)
    if kind in _APART:
        on_gpu = next(model.parameters()).is_cuda and kernels_available()
        return frozenset({SEQ_IDX, POSITIONS}) if on_gpu else frozenset()
    return frozenset() if kind is not None else _by_signatures(model)


def guard_packed_rows(model: nn.Module) -> list[PackedRowsGuard]:
    """Let a model refuse rows of several documents that it would not keep apart.

    For models with a recurrence that is known; any other is left alone.
    """
    known = _kind(model) in _APART | _LEAKING
    return [PackedRowsGuard(model)] if known or any(map(_mixer, model.modules())) else []


class PackedRowsGuard:
    """A forward hook that raises ValueError for rows of several documents, until :meth:`remove`."""

    def __init__(self, model: nn.Module) -> None:
        """Look at what every call of ``model`` is given."""
        self._left = _LOOKS_ON_A_GPU
        self._handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def remove(self) -> None:
        """Look no longer."""
        self._handle.remove()

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check one call."""
        if SEQ_IDX not in kwargs and POSITIONS not in kwargs:
            # Hardly anybody gives these by position.
            return
        if torch.compiler.is_compiling() or not self._may_look(kwargs):
            return
        problem = leak_of(model, kwargs)
        if problem is not None:
            raise ValueError(
                f"rows of this batch hold several documents, and {problem}. To train on joined "
                "texts knowingly, give neither seq_idx nor position_ids"
            )

    def _may_look(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether the arguments' values can be read now, and should be."""
        if not any(getattr(kwargs.get(name), "is_cuda", False) for name in (SEQ_IDX, POSITIONS)):
            return True
        if torch.cuda.is_current_stream_capturing() or not self._left:
            return False
        self._left -= 1
        return True


def leak_of(model: nn.Module, given: Mapping[str, Any]) -> str | None:
    """Say why documents that share a row would not be apart in a call; None where there are none.

    Args:
        model: A model with a recurrence.
        given: The arguments of a call by name.
    """
    if cache_among({n: v for n, v in given.items() if n not in (SEQ_IDX, POSITIONS)}) is not None:
        # Tokens that go on with a text.
        return None
    packed = [name for name in (SEQ_IDX, POSITIONS) if _several(given, name)]
    if not packed:
        return None
    name = type(model).__name__
    pad = (
        "give one document a row, padded on the right (in TRL's SFTConfig packing=False and "
        "padding_free=False; in Trainer not DataCollatorWithFlattening)"
    )
    kind = _kind(model)
    wanted = {SEQ_IDX, POSITIONS} if kind in _APART else set(_by_signatures(model))
    if not wanted or kind in _LEAKING:
        return f"{name} lets the state of one run into the next, whatever it is given: {pad}"
    if missing := [argument for argument in sorted(wanted) if argument not in packed]:
        return (
            f"{name} keeps them apart only if {' and '.join(missing)} says so too, next to "
            f"{' and '.join(packed)} (DataCollatorWithFlattening(return_seq_idx=True), or TRL's "
            f"padding_free=True); or {pad}"
        )
    if given.get("attention_mask") is not None and kind in _APART:
        return (
            f"{name} keeps them apart in its attention only without attention_mask, also where all "
            "of it is 1: leave it out"
        )
    if kind in _APART and _caches(model, given):
        return f"{name} keeps them apart in its attention only without a cache: use_cache=False"
    return None


def _kind(model: nn.Module) -> str | None:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return kind if isinstance(kind, str) and kind else None


def _mixer(module: nn.Module) -> bool:
    return mamba_ssm.recognises(module) or hf.fused_function(module) is not None


def _by_signatures(model: nn.Module) -> frozenset[str]:
    """``seq_idx``, if every sequence mixer takes it and the model hands it on.

    So do ``Mamba2`` models of mamba_ssm without attention.
    """
    arguments = inspect.signature(model.forward).parameters.values()
    hands_on = any(a.kind is a.VAR_KEYWORD or a.name == SEQ_IDX for a in arguments)
    mixers = [m for m in model.modules() if hasattr(m, "in_proj") and hasattr(m, "out_proj")]
    takes = all(SEQ_IDX in inspect.signature(type(m).forward).parameters for m in mixers)
    return frozenset({SEQ_IDX}) if hands_on and mixers and takes else frozenset()


def _caches(model: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether a call makes a cache: transformers' models do unless they are told otherwise."""
    asked = given.get("use_cache")
    config = getattr(model, "config", None)
    return bool(getattr(config, "use_cache", False) if asked is None else asked)


def _several(given: Mapping[str, Any], name: str) -> bool:
    """Whether an argument says that a row [b, l] holds more than one document."""
    value = given.get(name)
    if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[1] < 2 or value.is_meta:
        return False
    step = value.diff(dim=1)
    changes = step != (0 if name == SEQ_IDX else 1)
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == value.shape:
        # Where padding begins or ends, positions jump as well.
        real = mask.bool()
        changes = changes & real[:, 1:] & real[:, :-1]
    return bool(changes.any())
