"""Which packages the language bases are pretrained on, and under which licences.

The study's tasks come from other material: WordNet, Debian's package descriptions and Python's
standard library are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from prodial_kernels.embedded.making.sources import SOURCES, Source

__all__ = ["CODE", "ENGLISH", "CodeSource", "sources_named"]

# Of the embedded model's packages: enough for 50 MB of text; none that a task is made from.
_ENGLISH = (
    "postgresql-doc-15 sqlite3-doc dict-jargon python-django-doc python-scipy-doc "
    "python-sympy-doc python-astropy-doc python-sqlalchemy-doc python-setuptools-doc "
    "python-scrapy-doc cython-doc sphinx-doc borgbackup-doc snakemake-doc nodejs-doc "
    "cargo-web-doc clang-22-doc llvm-22-doc cmake-doc erlang-doc apache2-doc nova-doc neutron-doc "
    "cinder-doc ironic-doc ganeti-doc dpdk-doc ghc-doc imagemagick-6-doc "
    "python-statsmodels-doc python-tornado-doc krb5-doc"
)
_ENGLISH_MB = 2.2  # of each package at most
ENGLISH: tuple[Source, ...] = tuple(
    replace(source, limit_mb=min(source.limit_mb, _ENGLISH_MB))
    for source in SOURCES
    if source.package in _ENGLISH.split()
)


@dataclass(frozen=True)
class CodeSource:
    """One Debian package with source code.

    Attributes:
        package: Debian binary package, as ``apt-get download`` knows it.
        licence: SPDX expression of the code, as the package's copyright file states it.
        suffixes: Endings of the files to read.
        limit_mb: Most text to take, in 10^6 bytes.
        held_out: The whole package is kept out of training.
    """

    package: str
    licence: str
    suffixes: tuple[str, ...] = (".py",)
    limit_mb: float = 2.5
    held_out: bool = False


CODE: tuple[CodeSource, ...] = (
    CodeSource("python3-django", "BSD-3-Clause"),
    CodeSource("python3-sympy", "BSD-3-Clause", limit_mb=4),
    CodeSource("python3-numpy", "BSD-3-Clause"),
    CodeSource("python3-scipy", "BSD-3-Clause", limit_mb=3),
    CodeSource("python3-pandas", "BSD-3-Clause", limit_mb=3),
    CodeSource("python3-matplotlib", "PSF-2.0"),
    CodeSource("python3-sklearn", "BSD-3-Clause"),
    CodeSource("python3-networkx", "BSD-3-Clause"),
    CodeSource("python3-twisted", "MIT"),
    CodeSource("python3-sqlalchemy", "MIT"),
    CodeSource("python3-astropy", "BSD-3-Clause"),
    CodeSource("python3-statsmodels", "BSD-3-Clause"),
    CodeSource("python3-nova", "Apache-2.0", limit_mb=2),
    CodeSource("python3-neutron", "Apache-2.0", limit_mb=2),
    CodeSource("golang-1.19-src", "BSD-3-Clause", (".go",), limit_mb=5),
    CodeSource("libboost1.81-dev", "BSL-1.0", (".hpp",), limit_mb=3),
    CodeSource("rust-src", "MIT OR Apache-2.0", (".rs",), limit_mb=4),
    CodeSource("python3-tornado", "Apache-2.0", held_out=True),
)


def sources_named(names: list[str]) -> tuple[tuple[Source, ...], tuple[CodeSource, ...]]:
    """Return only the packages of these names; all of them for an empty list.

    Raises:
        ValueError: A name that neither list has.
    """
    known = {source.package for source in ENGLISH} | {source.package for source in CODE}
    if unknown := sorted(set(names) - known):
        raise ValueError(f"packages: unknown {unknown}; known are {sorted(known)}")
    chosen = set(names) or known
    return (
        tuple(s for s in ENGLISH if s.package in chosen),
        tuple(s for s in CODE if s.package in chosen),
    )
