"""``hotswap_adapter``: another adapter's values in the place of a loaded one's.

PEFT's function of that name (0.15 to 0.21.2 and its main branch on 2026-12-01) takes LoRA alone:
behind its check it rescales LoRA's layers. This one has its arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import Tensor, nn

from prodial_kernels.models.adapt.names import unwrapped
from prodial_kernels.peft.config import ProdialPeftConfig
from prodial_kernels.peft.layer import ProdialPeftLinear

_OF_LORA = ("lora_alpha", "alpha_pattern", "lora_dropout", "use_rslora", "use_dora")
"""What a LoRA beside computes with that its tensors do not say."""


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str,
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Replace the values of a loaded adapter by those of a saved one, in place.

    No tensor is replaced: what ``torch.compile`` has compiled and what :func:`prodial_kernels.
    capture` has captured stays valid and computes with the new values. Everything is checked
    before anything is changed. To load an adapter of other settings, delete the old one and call
    ``model.load_adapter``.

    Args:
        model: A ``PeftModel``, compiled or not.
        model_name_or_path: Directory or hub id of the saved adapter.
        adapter_name: The loaded adapter; it keeps its name.
        torch_device: Where the file is read to first; default: the CPU.
        kwargs: ``subfolder``, ``revision``, ``token``, ``cache_dir``, as PEFT takes them.

    Raises:
        TypeError: ``model`` is no ``PeftModel``.
        ValueError: There is no such adapter in the model, it is merged, the saved one is of another
            method, or differs in what it adapts, in shapes or in settings such as ``lora_alpha``.
    """
    inner: Any = unwrapped(model)
    if not isinstance(inner, PeftModel):
        raise TypeError(
            f"model must be a PeftModel, got {type(inner).__name__}; in a model that apply_prodial "
            "adapted, prodial_kernels.load_adapter replaces the values in place"
        )
    mine = inner.peft_config.get(adapter_name)
    if not isinstance(mine, ProdialPeftConfig):
        raise ValueError(
            f"adapter_name must be one of the model's ProDiaL adapters, got {adapter_name!r}; it "
            f"has {[n for n, c in inner.peft_config.items() if isinstance(c, ProdialPeftConfig)]}"
            + ("" if mine is None else "; for LoRA use peft.utils.hotswap.hotswap_adapter")
        )
    layers = {
        path: layer
        for path, layer in inner.base_model.model.named_modules()
        if isinstance(layer, ProdialPeftLinear) and adapter_name in layer.adapter_names
    }
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(
            f"adapter {adapter_name!r} is merged, and a merged weight would stay the old one; "
            "call model.unmerge_adapter() first"
        )
    theirs = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    if not isinstance(theirs, ProdialPeftConfig):
        raise ValueError(
            f"{model_name_or_path} holds a {theirs.peft_type} adapter, and {adapter_name!r} of the "
            "model is ProDiaL's"
        )
    loaded = load_peft_weights(model_name_or_path, device=torch_device or "cpu", **kwargs)
    others = inner.peft_config.keys() - {adapter_name}
    present = {
        name: tensor
        for name, tensor in get_peft_model_state_dict(inner, adapter_name=adapter_name).items()
        # PEFT 0.18 and 0.19 return the other adapters' too.
        if name in loaded or not others & set(name.split("."))
    }
    _check_names(present, loaded)
    _check_settings(mine, theirs, layers, adapter_name)
    _check_shapes(present, loaded)
    set_peft_model_state_dict(inner, loaded, adapter_name=adapter_name)


def _check_settings(
    mine: ProdialPeftConfig,
    theirs: ProdialPeftConfig,
    layers: Mapping[str, ProdialPeftLinear],
    adapter_name: str,
) -> None:
    """Raise ValueError for settings of a layer that are constants of compiled code and graphs."""
    for path in layers:
        one, other = (_settings(config, path) for config in (mine, theirs))
        for name, value in one.items():
            if value != other[name]:
                raise _different(adapter_name, f"{name} of {path}", value, other[name])
    for name in _OF_LORA if mine.lora and theirs.lora else ():
        values = [getattr(config.lora, name) for config in (mine, theirs)]
        if values[0] != values[1]:
            raise _different(adapter_name, f"lora.{name}", *values)


def _settings(config: ProdialPeftConfig, path: str) -> dict[str, Any]:
    values = vars(config.for_layer(path))
    # How the model computes, whatever the file was trained with.
    return {name: value for name, value in values.items() if name not in ("impl", "compute")}


def _different(adapter_name: str, what: str, mine: Any, theirs: Any) -> ValueError:
    return ValueError(
        f"{what} is {mine!r} in adapter {adapter_name!r} of the model and {theirs!r} in the saved "
        "one, and cannot change in place; call model.delete_adapter and model.load_adapter"
    )


def _check_names(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the tensors have the same names."""
    for whose, names in (
        ("the saved adapter does not have", sorted(mine.keys() - theirs.keys())),
        ("the model's adapter does not have", sorted(theirs.keys() - mine.keys())),
    ):
        if names:
            raise ValueError(
                f"{whose} {names[0]} ({len(names)} tensors in all): the adapters are of "
                "other layers or parts; call model.delete_adapter and model.load_adapter"
            )


def _check_shapes(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the tensors, of the same names, have the same shapes."""
    for name, tensor in mine.items():
        if tensor.shape != theirs[name].shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)} in the model and {list(theirs[name].shape)} in "
                "the saved adapter; call model.delete_adapter and model.load_adapter"
            )
