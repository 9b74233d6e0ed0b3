"""Whether PEFT is installed, in a version that this package knows: checked before it is used."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from prodial_kernels.upstream import require_extra

if TYPE_CHECKING:
    from packaging.version import Version

OLDEST = "0.18"


def _installed() -> Version:
    """Return PEFT's version, or raise ImportError with what to install."""
    require_extra("prodial_kernels.peft", ("peft",), extra="peft")
    from packaging.version import Version  # comes with PEFT

    found = Version(version("peft"))
    if Version(OLDEST) > found:
        raise ImportError(
            f"prodial_kernels.peft needs PEFT {OLDEST} or newer, this is {found}; "
            f"pip install --upgrade 'peft>={OLDEST}'"
        )
    return found


PEFT_VERSION = _installed()
