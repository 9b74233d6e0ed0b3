"""What ``apply_prodial`` leaves on a model: its adapters, and what undoing needs."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from prodial_kernels.config import ProdialConfig
from prodial_kernels.linear import adapted_layers
from prodial_kernels.models.adapt.names import unwrapped
from prodial_kernels.models.methods.base import additions_of
from prodial_kernels.models.patch_point import Undo
from prodial_kernels.tuners import tuner_layers

STATE = "_prodial_state"
"""The attribute of an adapted model."""


@dataclass
class AdaptedState:
    """What undoing needs, kept on the model as one attribute.

    Attributes:
        adapters: The configuration of every adapter, by name.
        active: The name of the one that calls compute with.
        requires_grad: Flags of the model's parameters before, by name.
        parameters: What undoes the fp32 masters and the offsets of other parameters.
        mixers: What gives the mixers their own paths back; made again when layers come or go.
        unfinished: The function that was stopped while it merged layer after layer, of which it
            keeps no copy; None if none was.
        kept: While the rest is merged, the tensors of methods that cannot be, by their plain names.
    """

    adapters: dict[str, ProdialConfig]
    active: str
    requires_grad: dict[str, bool]
    parameters: list[Undo] = field(default_factory=list)
    mixers: list[Undo] = field(default_factory=list)
    unfinished: str | None = None
    kept: dict[str, Tensor] | None = None

    @property
    def config(self) -> ProdialConfig:
        """The active adapter's configuration."""
        return self.adapters[self.active]


def is_adapted(model: nn.Module) -> bool:
    """Whether ``apply_prodial`` or PEFT has put an adapter or methods into ``model``."""
    inner = unwrapped(model)
    return STATE in vars(inner) or bool(adapted_layers(inner))


def inserted_into(model: nn.Module) -> int:
    """Return how many tokens methods put beside a text's own, at most."""
    state = vars(unwrapped(model)).get(STATE)
    return sum(m.inserted for m in state.config.methods) if isinstance(state, AdaptedState) else 0


def state_of(model: nn.Module, *, taking_out: str | None = None) -> AdaptedState:
    """Return what ``apply_prodial`` left on the model.

    Args:
        model: As given, perhaps in a wrapper that holds it whole.
        taking_out: The function that asks, if it merges. It alone goes on where it was stopped:
            until then some layers are plain and others adapted.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: There is nothing, or a merge was stopped half way.
    """
    check_model(model)
    inner = unwrapped(model)
    # Not by getattr: wrappers forward attributes, but name the parameters differently.
    state = vars(inner).get(STATE)
    if not isinstance(state, AdaptedState):
        peft = not {*tuner_layers(inner)}.isdisjoint(adapted_layers(inner))
        raise ValueError(
            f"this {type(inner).__name__} has no ProDiaL adapter"
            + (
                " of apply_prodial: PEFT put its adapters in, so call the PeftModel's own functions"
                if peft
                else "; pass the very module that apply_prodial was called on, not a wrapper or a "
                "part of it"
            )
        )
    if state.unfinished not in (None, taking_out):
        raise ValueError(
            f"{state.unfinished} was stopped half way through this model, so that some of its "
            f"layers are adapted and some are not; call {state.unfinished}(model) again to finish"
        )
    return state


def multipliers_of(model: nn.Module) -> dict[int, tuple[float, float]]:
    """Return, by the ids of parameters that methods train, what multiplies decay and learning rate.

    Of modules that are trained as they are, as a head, methods have no multipliers.
    """
    state = vars(unwrapped(model)).get(STATE)
    if not isinstance(state, AdaptedState):
        return {}
    return {
        id(handle.module._parameters[name]): (handle.method.decay, handle.method.lr)
        for handle in additions_of(state.parameters)
        if handle.method is not None
        for name in handle.names
        if name in handle.module._parameters
    }


def known_adapter(state: AdaptedState, adapter: object) -> str:
    """Return ``adapter``, or raise ValueError where the model has none of that name."""
    if not isinstance(adapter, str) or adapter not in state.adapters:
        raise ValueError(f"the model has no adapter {adapter!r}; it has {[*state.adapters]}")
    return adapter


def check_model(model: object) -> None:
    """Raise TypeError for what is no module, such as the class of one."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model must be an nn.Module, got {what}")


def refuse_wrapper(model: nn.Module, function: str) -> None:
    """Raise ValueError for a wrapper that would not know which parameters ``function`` trains.

    TypeError for what is no module.
    """
    check_model(model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "model is wrapped in DistributedDataParallel, which would not know of the new "
            f"parameters and not average their gradients; call {function} on the module first, "
            "and wrap it after that"
        )


def undo_all(changes: list[Undo]) -> None:
    """Undo, the last change first; undoing one twice, after an interrupt, changes nothing."""
    for change in reversed(changes):
        change.remove()
