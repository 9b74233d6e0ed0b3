"""Whether PEFT is installed, in a version that this package knows: checked before it is used."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

from prodial_kernels.upstream import require_extra

OLDEST = "0.18"

require_extra("prodial_kernels.peft", ("peft",), extra="peft")
PEFT_VERSION = Version(version("peft"))

if Version(OLDEST) > PEFT_VERSION:
    raise ImportError(
        f"prodial_kernels.peft needs PEFT {OLDEST} or newer, this is {PEFT_VERSION}; "
        f"pip install --upgrade 'peft>={OLDEST}'"
    )
