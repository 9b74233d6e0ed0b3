"""A saved adapter that a run begins with: its settings are the run's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from prodial_kernels.checkpoint import SavedAdapter, read_adapter
from prodial_kernels.checkpoint.adapter import describe_tensor
from prodial_kernels.checkpoint.hashing import hash_tensor
from prodial_kernels.files.sha256 import sha256_of_values
from prodial_kernels.models.loading.load import EMBEDDED, is_stored_quantized
from prodial_kernels.quantization import FORMATS
from prodial_kernels.quantization.modules.selection import stores_everything
from prodial_kernels.training.config import (
    ADAPTER_OPTIONS,
    ConfigError,
    FinetuneConfig,
)
from prodial_kernels.training.options import COMBINED, checked_methods

_DESCRIPTION = "adapter_config.json"


def with_settings_of_adapter(config: FinetuneConfig, *, named: bool = True) -> FinetuneConfig:
    """Fill in what ``config.init_adapter`` settles: the adapter's options, method, model, format.

    Args:
        config: Without an ``init_adapter`` it is returned as it is.
        named: Whether the model is loaded by its name, rather than handed in.

    Raises:
        AdapterError: There is no adapter, or it is damaged.
        ConfigError: An option contradicts it.
        ModelError: The model's configuration cannot be read.
    """
    if config.init_adapter is None:
        return config
    place = Path(config.init_adapter).expanduser()
    of_a_run = place / "adapter"
    if not (place / _DESCRIPTION).is_file() and (of_a_run / _DESCRIPTION).is_file():
        place = of_a_run
    saved = read_adapter(place)
    pure_lora = not saved.config.train_scale and not saved.config.train_diagonal
    if config.method == "lora" and not pure_lora:
        raise ConfigError(
            f"`method` 'lora' contradicts `init_adapter`: the adapter in {place} has an output "
            "scale or a diagonal factor; leave `method` out"
        )
    if saved.config.methods:
        return _with_methods(config, saved, place, named=named)
    settled = _options(saved)
    _check_options(config, settled, place)
    changes = dict(settled)
    # Of what an adapter has by default a configuration says nothing.
    for name in ("modules_to_save", "allow_partial"):
        changes[name] = changes[name] or None
    changes["method"] = "lora" if pure_lora else "prodial"
    return _of_base(config, changes, saved, place, named=named)


def _with_methods(
    config: FinetuneConfig, saved: SavedAdapter, place: Path, *, named: bool
) -> FinetuneConfig:
    """Fill in what an adapter with a list of methods settles."""
    methods = checked_methods(replace(saved.config, impl="auto").listed())
    given = [f"`{n}`" for n in (*ADAPTER_OPTIONS, "preset") if getattr(config, n) is not None]
    if config.methods not in (None, methods):
        given.append("`methods`")
    if given or config.method not in ("prodial", COMBINED, *(each["name"] for each in methods)):
        raise ConfigError(
            f"the adapter in {place} has methods of its own, and {', '.join(given) or '`method`'} "
            "would contradict them; leave it out, or begin without `init_adapter`"
        )
    changes: dict[str, Any] = {"method": "prodial", "methods": methods}
    return _of_base(config, changes, saved, place, named=named)


def _of_base(
    config: FinetuneConfig,
    changes: dict[str, Any],
    saved: SavedAdapter,
    place: Path,
    *,
    named: bool,
) -> FinetuneConfig:
    changes["init_adapter"] = str(place.resolve())
    if named:
        if config.model == EMBEDDED and saved.base_model is not None:
            changes["model"] = saved.base_model
        changes["quantize"] = _format(config, saved, changes.get("model", config.model))
        everything = changes["quantize"] is not None and stores_everything(saved.base_stored)
        changes["quantize_modules"] = "all" if everything else "projectors"
    return replace(config, **changes)


def adapter_fingerprint(directory: str) -> str:
    """Return what tells an adapter's values from any other's."""
    tensors = read_adapter(directory).tensors
    return sha256_of_values(
        {name: [describe_tensor(t), hash_tensor(t)] for name, t in tensors.items()}
    )[:32]


def _options(saved: SavedAdapter) -> dict[str, Any]:
    values = saved.config.to_dict()
    return {
        name: tuple(values[name]) if isinstance(values[name], list) else values[name]
        for name in ADAPTER_OPTIONS
    }


def _check_options(config: FinetuneConfig, settled: dict[str, Any], place: Path) -> None:
    """Raise ConfigError where an option is given, or comes with the preset, and is another."""
    asked = {name: getattr(config, name) for name in ADAPTER_OPTIONS}
    if config.preset is not None:
        whole = replace(config, init_adapter=None).resolved()
        asked = {name: getattr(whole, name) for name in ADAPTER_OPTIONS}
    differing = [
        f"`{name}` {value!r} (the adapter: {settled[name]!r})"
        for name, value in asked.items()
        if value is not None and value != settled[name]
    ]
    if differing:
        source = "" if config.preset is None else f", with `preset` {config.preset!r},"
        raise ConfigError(
            f"the adapter in {place} has settings of its own, and the options{source} contradict "
            f"them: {', '.join(differing)}; leave them out, or begin without `init_adapter`"
        )


def _format(config: FinetuneConfig, saved: SavedAdapter, model: str) -> str | None:
    """The format of the base that the adapter was trained on, to which it belongs."""
    wanted, trained_on = config.quantize, saved.base_format
    if trained_on is None:
        return wanted
    own = trained_on if trained_on in FORMATS and not is_stored_quantized(model) else None
    if wanted not in (None, "auto", own):
        raise ConfigError(
            f"`quantize` {wanted!r} contradicts `init_adapter`, which was trained on {trained_on} "
            "weights; leave it out"
        )
    return own
