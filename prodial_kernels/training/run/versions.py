"""The versions of what decides what a run computes."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("torch", "transformers", "triton", "mamba-ssm", "causal-conv1d")


def versions() -> dict[str, str]:
    """Return the version of Python, of this package, and of each of those that is installed."""
    from prodial_kernels._version import __version__

    found = {"python": platform.python_version(), "prodial-kernels": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
