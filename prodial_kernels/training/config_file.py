"""Options of a run in a JSON or TOML file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prodial_kernels._checks import similar_path
from prodial_kernels.files.json_values import each_once
from prodial_kernels.files.reading import read_bytes
from prodial_kernels.training.config import OPTIONS, ConfigError, FinetuneConfig
from prodial_kernels.training.options import checked_value

# Far more than all options take.
_LARGEST = 1 << 24


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Read options from a JSON or TOML file; of a run's ``run.json``, those that it ran with.

    Raises:
        ConfigError: The file cannot be read, is neither, or holds no table of options; or an option
            in it is unknown or has a value that it cannot have.
    """
    file = Path(path).expanduser()
    try:
        content = read_bytes(file, most_of_a_pipe=_LARGEST)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{file}: no such file (looked in {Path.cwd()}){similar_path(file)}"
        ) from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from error
    if len(content) > _LARGEST:
        raise ConfigError(f"{file}: {len(content):,} bytes are too many for options")
    try:
        values = _parse(content.decode("utf-8-sig"), toml=file.suffix.lower() == ".toml")
    except RecursionError as error:
        raise ConfigError(f"{file}: nested too deeply to be options") from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{file}: not valid {_format_of(file)}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f'{file}: expected options by name, such as {{"steps": 500}}, got '
            f"{type(values).__name__}"
        )
    if "format_version" in values and isinstance(values.get("config"), dict):
        # A run's own record. Where it is kept is the one thing that another run cannot share.
        values = {name: value for name, value in values["config"].items() if name != "output"}
    FinetuneConfig.check_names(values, source=str(file))
    try:
        for name, value in values.items():
            checked_value(OPTIONS[name], value)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    return values


def _parse(text: str, *, toml: bool) -> Any:
    if not toml:
        return json.loads(text, object_pairs_hook=each_once)
    try:
        import tomllib
    except ImportError as error:
        raise ConfigError("TOML files need Python 3.11 or newer; use JSON") from error
    return tomllib.loads(text)


def _format_of(file: Path) -> str:
    return "TOML" if file.suffix.lower() == ".toml" else "JSON (or name it .toml)"
