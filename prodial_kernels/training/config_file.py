"""Options of a run in a JSON or TOML file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prodial_kernels.training.config import ConfigError, FinetuneConfig


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Read options from a JSON or TOML file.

    Raises:
        ConfigError: The file cannot be read, is neither, or holds no table of options.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
        values = _parse_toml(text) if file.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{file}: not valid: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected options by name, got {type(values).__name__}")
    FinetuneConfig.check_names(values, source=str(file))
    return values


def _parse_toml(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError as error:
        raise ConfigError("TOML files need Python 3.11 or newer; use JSON") from error
    return tomllib.loads(text)
