"""Other libraries: those that an extra installs, and the tested releases of those touched inside.

What is touched where, and why, is listed in ``models/mixers/README.md``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from types import MappingProxyType

TESTED: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "torch": ("2.11.0", "2.14.1"),
        "triton": ("3.6.0", "3.9.0"),
        "transformers": ("5.17.0", "5.24.0"),
        "mamba_ssm": ("2.3.2.post1", "2.3.2.post1"),
        "causal_conv1d": ("1.7.0", "1.7.0"),
        "peft": ("0.18.0", "0.21.2"),
    }
)
"""Of every library, by its import's name: the oldest and the newest release that were tested."""


class UpstreamWarning(UserWarning):
    """A library is not as expected: the result is right, but may take more time or memory."""


class UpstreamError(RuntimeError):
    """A library is not as expected, and what was asked for cannot be computed with it."""


def tested_with(library: str) -> str:
    """Say which releases of one of :data:`TESTED` are, and which one this is, within a sentence."""
    oldest, newest = TESTED[library]
    tested = oldest if oldest == newest else f"{oldest} to {newest}"
    return f"prodial_kernels is tested with {library} {tested}; this is {installed(library)}"


def library_of(item: type | Callable[..., object]) -> str | None:
    """Return the library of :data:`TESTED` that a class or function is of, or None."""
    name = (getattr(item, "__module__", None) or "").partition(".")[0]
    return name if name in TESTED else None


def installed(library: str) -> str:
    """Return the installed release of a library, by its import's name."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def warn(library: str, problem: str) -> None:
    """Warn that a library is not as expected, where the result is right nevertheless."""
    warnings.warn(f"{problem}; {tested_with(library)}", UpstreamWarning, stacklevel=3)


def error(library: str, problem: str) -> UpstreamError:
    """Return the error for a library that is not as expected."""
    return UpstreamError(f"{problem}; {tested_with(library)}")


CLI = ("transformers", "tqdm", "matplotlib")
"""The libraries of the extra ``cli``: what the command line and fine-tuning need beside a layer."""


class MissingExtraError(ImportError):
    """A library that comes with an extra of this package is not installed."""


def require_extra(user: str, libraries: Sequence[str] = CLI, *, extra: str = "cli") -> None:
    """Raise unless libraries of an extra can be imported; none of them is loaded.

    Args:
        user: What needs them, as the subject of the error's sentence.
        libraries: Those that it needs.
        extra: What installs them.

    Raises:
        MissingExtraError: Names what is missing, and the command that installs it.
    """
    missing = [library for library in libraries if find_spec(library) is None]
    if missing:
        raise MissingExtraError(
            f"{user} needs {', '.join(missing)}, not installed here: "
            f'pip install "prodial-kernels[{extra}]"'
        )
