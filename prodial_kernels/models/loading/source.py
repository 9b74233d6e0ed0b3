"""Where a model is: embedded, in a directory, or on the hub; a path to nothing fails at once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

EMBEDDED = "embedded"

_SMALL = ("*.json", "*.txt", "*.model")
# What the hub allows in "owner/name" and in "name".
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
# What a run and a trainer write: no model on the hub is called so.
_WRITTEN_HERE = re.compile(r"adapter|merged|model|state|checkpoint-\d+")
_TOLD_BY = ("config.json", "adapter_config.json", "run.json")
_MODELS_OF_A_RUN = ("merged", "model")
_CONNECT_SECONDS = 5.0


class ModelError(RuntimeError):
    """A model cannot be loaded, or not on this device."""


def model_source(name: str) -> Path | str:
    """Return a directory that holds a model, or a hub id.

    Raises:
        ModelError: ``name`` is a path, and there is no model that can be read; the hub is not
            asked.
    """
    if name == EMBEDDED:
        from prodial_kernels.embedded import embedded_model_path

        return embedded_model_path()
    path = Path(name).expanduser()
    if path.is_dir():
        _check_directory(path)
        return path
    if path.exists():
        raise ModelError(f"{path} is a file; give the directory that holds the model")
    similar = _similar(path)
    if similar is not None or _is_path(name, path):
        hint = f"; did you mean {similar}?" if similar is not None else ""
        raise ModelError(f"{name}: no such directory (looked in {Path.cwd()}){hint}")
    return name


@contextmanager
def without_retries(source: Path | str) -> Iterator[dict[str, Any]]:
    """Yield what to pass to ``from_pretrained``, so that it neither waits nor runs code.

    Code in a model's directory is never run, nor is anybody asked whether to. Without a network,
    a hub id is looked up in the cache alone: else each file is asked for again and again.
    """
    options: dict[str, Any] = {"trust_remote_code": False}
    if isinstance(source, Path):
        yield options
        return
    from huggingface_hub.utils import logging

    if not _hub_answers():
        options["local_files_only"] = True
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield options
    finally:
        logging.set_verbosity(before)


def fetched(hub_id: str, *, local_files_only: bool = False, **_: Any) -> Path:
    """Download a checkpoint, in safetensors where it has them."""
    from huggingface_hub import snapshot_download

    for weights in (("model*.safetensors",), ("pytorch_model*.bin",)):
        directory = Path(
            snapshot_download(
                hub_id, allow_patterns=[*_SMALL, *weights], local_files_only=local_files_only
            )
        )
        if any(file for pattern in weights for file in directory.glob(pattern)):
            break
    return directory


def _check_directory(path: Path) -> None:
    """Raise ModelError unless ``path`` looks like a model in transformers' format."""
    file = path / "config.json"
    if not file.is_file():
        if (path / "adapter_config.json").is_file():
            raise ModelError(
                f"{path} holds an adapter, not a model; give its base model as the model, and this "
                "directory as the adapter"
            )
        written = [path / part for part in _MODELS_OF_A_RUN if (path / part / file.name).is_file()]
        hint = f"; did you mean {str(written[0])!r}?" if written else ""
        raise ModelError(f"{path} holds no model: there is no config.json in it{hint}")
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON ({error}); fetch the model again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} must hold a JSON object; fetch the model again")


def _is_path(name: str, path: Path) -> bool:
    """Whether ``name`` is meant as a path, although nothing is there."""
    inside_a_directory_here = path.parent != Path(".") and path.parent.is_dir()
    return (
        inside_a_directory_here
        or name.startswith((".", "~", os.sep))
        or _HUB_ID.fullmatch(name) is None
        or (path.parent != Path(".") and _WRITTEN_HERE.fullmatch(path.name) is not None)
    )


def _similar(path: Path) -> Path | None:
    """A model, adapter or run that is here, and that ``path`` may be a misspelling of."""
    missing = path
    while not missing.parent.is_dir():
        missing = missing.parent
    try:
        there = [entry.name for entry in missing.parent.iterdir() if entry.is_dir()]
    except OSError:
        return None
    close = get_close_matches(missing.name, there, n=1, cutoff=0.8)
    meant = missing.parent / close[0] / path.relative_to(missing) if close else missing
    return meant if any((meant / file).is_file() for file in _TOLD_BY) else None


def _hub_answers() -> bool:
    """Whether the hub can be reached, as far as one attempt tells."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():
        # Offline nothing is waited for; and what a proxy reaches only it knows.
        return True
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), _CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
