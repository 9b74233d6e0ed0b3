"""Options of a run in a JSON, TOML or YAML file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prodial_kernels._checks import similar_path
from prodial_kernels.files.json_values import each_once
from prodial_kernels.files.reading import read_bytes
from prodial_kernels.training.config import OPTIONS, ConfigError, FinetuneConfig
from prodial_kernels.training.options import checked_value
from prodial_kernels.upstream import require_extra

# Far more than all options take.
_LARGEST = 1 << 24
_FORMATS = {".toml": "TOML", ".yaml": "YAML", ".yml": "YAML"}


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Read options from a JSON, TOML (.toml) or YAML (.yaml, .yml) file, by its ending.

    Of a run's ``run.json`` they are those that it ran with. YAML is read as version 1.2 has it:
    ``3e-4`` is a number, and ``off`` a word.

    Raises:
        MissingExtraError: PyYAML, which comes with transformers, is not installed.
        ConfigError: The file cannot be read, is none of these, or holds no table of options; or an
            option in it is unknown or has a value that it cannot have.
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
        values = _parse(content.decode("utf-8-sig"), _format_of(file))
    except RecursionError as error:
        raise ConfigError(f"{file}: nested too deeply to be options") from error
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    except ValueError as error:
        named = _format_of(file)
        hint = " (or name it .toml or .yaml)" if named == "JSON" else ""
        raise ConfigError(f"{file}: not valid {named}{hint}: {error}") from error
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


def _parse(text: str, format: str) -> Any:
    if format == "JSON":
        return json.loads(text, object_pairs_hook=each_once)
    if format == "YAML":
        require_extra("a configuration in YAML", ("yaml",))
        from prodial_kernels.files.yaml_values import parsed_yaml

        return parsed_yaml(text)
    try:
        import tomllib
    except ImportError as error:
        raise ConfigError("TOML files need Python 3.11 or newer; use JSON or YAML") from error
    return tomllib.loads(text)


def _format_of(file: Path) -> str:
    return _FORMATS.get(file.suffix.lower(), "JSON")
