"""Adapters of PEFT in the same model, which freezes the parameters that are not its own.

``get_peft_model`` sets ``requires_grad`` to False on every parameter but its own, those of ProDiaL
included, and tells nobody. A layer therefore looks, where it would train, whether it still may.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from weakref import WeakKeyDictionary, ref

from torch import nn

# Not attributes of the layers: copies and pickles of a layer must not take its model along.
_MODELS: WeakKeyDictionary[nn.Module, ref[nn.Module]] = WeakKeyDictionary()
_WARNED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

_FIX = (
    "To train both, set requires_grad_(True) on the parameters named prodial_* and build the "
    "optimiser after that; to train the other alone, call merge_prodial(model) first"
)


def tuner_layers(model: nn.Module) -> list[str]:
    """Return the paths of the layers that PEFT put into ``model``, found by what they carry."""
    # By name, so that PEFT need not be there, nor be imported.
    return [
        name
        for name, module in model.named_modules()
        if any(cls.__name__ == "BaseTunerLayer" for cls in type(module).__mro__)
    ]


def remember_model(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Note which model adapted ``layers`` belong to, for :func:`check_still_trained`."""
    for layer in layers:
        _MODELS[layer] = ref(model)


def check_still_trained(layer: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Refuse to train a model beside an adapter that another library has frozen.

    Call it where ``layer`` is about to be called for training; it costs nothing where any of
    ``parameters`` requires a gradient.

    Raises:
        RuntimeError: None does, and the layer's model carries layers of PEFT.
    """
    if any(parameter.requires_grad for parameter in parameters):
        return
    model = _MODELS.get(layer, lambda: None)()
    if model is None or any(
        parameter.requires_grad
        for name, parameter in model.named_parameters()
        if "prodial_" in name.rpartition(".")[2]
    ):
        return
    others = tuner_layers(model)
    if others:
        raise RuntimeError(
            f"every ProDiaL parameter of this {type(model).__name__} is frozen, so training would "
            f"leave the adapter as it is: PEFT froze them when it put in {len(others)} layers of "
            f"its own, such as {others[0]}. {_FIX}"
        )
    if "peft" in sys.modules and model not in _WARNED:
        _WARNED[model] = True
        warnings.warn(
            f"every ProDiaL parameter of this {type(model).__name__} is frozen while it runs in "
            f"training mode. If PEFT froze them, as get_peft_model does: {_FIX}",
            stacklevel=2,
        )
