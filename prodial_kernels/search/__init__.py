"""The hybrid search: which methods to combine, then their sizes. ``search(SearchConfig(...))``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prodial_kernels.search.config import SearchConfig
    from prodial_kernels.search.result import SearchResult
    from prodial_kernels.search.searching import search

__all__ = ["SearchConfig", "SearchResult", "search"]

_HOMES = {"SearchConfig": "config", "SearchResult": "result", "search": "searching"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the command line's help needs none of them."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
