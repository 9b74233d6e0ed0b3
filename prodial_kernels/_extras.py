"""What the command line and fine-tuning need beyond the layer: the extra ``cli``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

CLI = ("transformers", "tqdm", "matplotlib")
"""The libraries of the extra ``cli``; ``pyproject.toml`` has their oldest versions."""


class MissingExtraError(ImportError):
    """A library that comes with an extra of this package is not installed."""


def require_cli(user: str, libraries: Sequence[str] = CLI) -> None:
    """Raise unless libraries of the extra ``cli`` can be imported; none of them is loaded.

    Args:
        user: What needs them, as the subject of the error's sentence.
        libraries: Those that it needs.

    Raises:
        MissingExtraError: Names what is missing, and the command that installs it.
    """
    missing = [library for library in libraries if find_spec(library) is None]
    if missing:
        raise MissingExtraError(
            f"{user} needs {', '.join(missing)}, not installed here: "
            'pip install "prodial-kernels[cli]"'
        )
