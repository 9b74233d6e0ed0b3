"""Fine-tuning: data, loop, evaluation. ``finetune(FinetuneConfig(...))`` does the whole of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prodial_kernels.training.callbacks.base import Callback, RunView
    from prodial_kernels.training.callbacks.early_stopping import EarlyStopping
    from prodial_kernels.training.config import FinetuneConfig
    from prodial_kernels.training.finetuning import finetune
    from prodial_kernels.training.results import FinetuneResult

__all__ = [
    "Callback", "EarlyStopping", "FinetuneConfig", "FinetuneResult", "RunView", "finetune",
]  # fmt: skip

_HOMES = {
    "Callback": "callbacks.base",
    "EarlyStopping": "callbacks.early_stopping",
    "FinetuneConfig": "config",
    "FinetuneResult": "results",
    "RunView": "callbacks.base",
    "finetune": "finetuning",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the command line's help needs none of them."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
