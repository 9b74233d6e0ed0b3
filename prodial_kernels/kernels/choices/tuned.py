"""Launch configurations found faster by measurement than those the rules choose. Imports no Triton.

``benchmarks/tune.py`` measures them and writes ``tuned_table.py``, which is data and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from prodial_kernels.kernels.choices.tuned_table import TABLE

ConfigT = TypeVar("ConfigT")
Value = int | bool

# (kernel, device family, M bucket, N, K, padded rank, dtype of the operands)
Key = tuple[str, str, int, int, int, int, str]


def device_family(capability: tuple[int, int], processors: int) -> str:
    """What a configuration is tuned for: ``sm_90x132``, an architecture and its multiprocessors."""
    return f"sm_{capability[0]}{capability[1]}x{processors}"


def token_bucket(m: int) -> int:
    """The power of two nearest to m by ratio, from 256 on: what one entry stands for."""
    m = max(m, 256)
    below = 1 << (m.bit_length() - 1)
    return below if m * m <= 2 * below * below else 2 * below


def key_of(kernel: str, family: str, m: int, n: int, k: int, r_pad: int, dtype: str) -> Key:
    """The table's key for a projector of x [m, k] and y [m, n]."""
    return kernel, family, token_bucket(m), n, k, r_pad, dtype


def tuned(default: ConfigT, key: Key, table: Mapping[Key, Mapping[str, Value]] = TABLE) -> ConfigT:
    """Return ``default`` with the fields that the table has for ``key``, else ``default`` itself.

    A device, a shape or a dtype that was not tuned keeps the rules' choice, and so does a field
    that the entry does not name.

    Args:
        default: A frozen dataclass, possibly holding others.
        key: From :func:`key_of`.
        table: Entries by key; a field of a nested dataclass is named ``outer.inner``.

    Raises:
        ValueError: The entry names a field that the configuration does not have.
    """
    entry = table.get(key)
    return default if entry is None else with_fields(default, entry)


def with_fields(config: ConfigT, changes: Mapping[str, Value]) -> ConfigT:
    """Return ``config`` with fields replaced, ``outer.inner`` inside nested dataclasses.

    Raises:
        ValueError: No such field.
    """
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        if not is_dataclass(config) or head not in {field.name for field in fields(config)}:
            raise ValueError(f"changes: {type(config).__name__} has no field {head!r}")
        inner: Any = with_fields(getattr(config, head), {rest: value}) if rest else value
        config = replace(config, **{head: inner})  # type: ignore[type-var]
    return config
