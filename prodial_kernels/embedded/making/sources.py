"""Which documentation packages the embedded model is pretrained on, and under which licence."""

from dataclasses import dataclass

__all__ = ["SOURCES", "Source"]


@dataclass(frozen=True)
class Source:
    """One Debian documentation package.

    Attributes:
        package: Debian binary package, as ``apt-get download`` knows it.
        licence: SPDX expression (or ``LicenseRef-``) of the documentation text, as the package's
            copyright file states it.
        only: Substrings of which a file's path must contain one; empty takes every page.
        skip: Substrings that rule a file's path out.
        limit_mb: Most clean text to take, in 10^6 bytes, so that no project dominates.
        held_out: The whole package is kept out of training, as a test on an unseen project.
    """

    package: str
    licence: str
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    limit_mb: float = 4.0
    held_out: bool = False


SOURCES: tuple[Source, ...] = (
    Source("python3.11-doc", "PSF-2.0", limit_mb=12),
    Source("postgresql-doc-15", "PostgreSQL", limit_mb=12),
    Source("sqlite3-doc", "LicenseRef-public-domain", limit_mb=12),
    Source("dict-jargon", "LicenseRef-public-domain"),
    Source("dict-wn", "LicenseRef-WordNet-3.0", limit_mb=8),
    Source("python-django-doc", "BSD-3-Clause", limit_mb=8),
    Source("python-scipy-doc", "BSD-3-Clause", limit_mb=8),
    Source("python-pandas-doc", "BSD-3-Clause", limit_mb=8),
    Source("python-sympy-doc", "BSD-3-Clause", limit_mb=6),
    Source("python-sklearn-doc", "BSD-3-Clause", limit_mb=6),
    Source("python-skimage-doc", "BSD-3-Clause"),
    Source("python-statsmodels-doc", "BSD-3-Clause", skip=("/notebooks/",)),
    Source("python-astropy-doc", "BSD-3-Clause"),
    Source("python-dask-doc", "BSD-3-Clause"),
    Source("python-distributed-doc", "BSD-3-Clause"),
    Source("python-ipython-doc", "BSD-3-Clause"),
    Source("python-flask-doc", "BSD-3-Clause"),
    Source("python-werkzeug-doc", "BSD-3-Clause"),
    Source("python-jinja2-doc", "BSD-3-Clause"),
    Source("python-djangorestframework-doc", "BSD-2-Clause"),
    Source("python-tables-doc", "BSD-3-Clause"),
    Source("python-lmfit-doc", "MIT"),
    Source("python-xarray-doc", "Apache-2.0"),
    Source("python-pymatgen-doc", "MIT"),
    Source("python-vispy-doc", "BSD-3-Clause"),
    Source("python-ezdxf-doc", "MIT"),
    Source("python-sqlalchemy-doc", "MIT", limit_mb=6),
    Source("python-pytest-doc", "MIT"),
    Source("python-requests-doc", "Apache-2.0"),
    Source("python-setuptools-doc", "MIT"),
    Source("python-tornado-doc", "Apache-2.0"),
    Source("python-attr-doc", "MIT"),
    Source("python-babel-doc", "BSD-3-Clause"),
    Source("python-markdown-doc", "BSD-3-Clause"),
    Source("python-cryptography-doc", "Apache-2.0 OR BSD-3-Clause"),
    Source("python-kombu-doc", "BSD-3-Clause"),
    Source("python-scrapy-doc", "BSD-3-Clause"),
    Source("python-mako-doc", "MIT"),
    Source("cython-doc", "Apache-2.0"),
    Source("sphinx-doc", "BSD-2-Clause"),
    Source("borgbackup-doc", "BSD-3-Clause"),
    Source("snakemake-doc", "MIT"),
    Source("twisted-doc", "MIT"),
    Source("nodejs-doc", "MIT", skip=("/all.html",)),
    Source(
        "rust-web-doc",
        "MIT OR Apache-2.0",
        skip=("/src/", "/core/", "/alloc/", "/arch/", "/simd/", "/intrinsics/", "/os/"),
        limit_mb=8,
    ),
    Source("cargo-web-doc", "MIT OR Apache-2.0", skip=("/src/",)),
    Source("golang-1.19-doc", "BSD-3-Clause"),
    Source("llvm-22-doc", "Apache-2.0 WITH LLVM-exception", skip=("/AMDGPU/",), limit_mb=8),
    Source("clang-22-doc", "Apache-2.0 WITH LLVM-exception", limit_mb=6),
    Source("cmake-doc", "BSD-3-Clause", limit_mb=6),
    Source("erlang-doc", "Apache-2.0", limit_mb=8),
    Source("apache2-doc", "Apache-2.0", only=("/en/",), limit_mb=6),
    Source("libboost1.81-doc", "BSL-1.0", limit_mb=6),
    Source("nova-doc", "Apache-2.0"),
    Source("neutron-doc", "Apache-2.0"),
    Source("cinder-doc", "Apache-2.0"),
    Source("keystone-doc", "Apache-2.0"),
    Source("swift-doc", "Apache-2.0"),
    Source("glance-doc", "Apache-2.0"),
    Source("ironic-doc", "Apache-2.0"),
    Source("ganeti-doc", "BSD-2-Clause"),
    Source("varnish-doc", "BSD-2-Clause"),
    Source("dpdk-doc", "BSD-3-Clause", only=("/guides/",)),
    Source("derby-doc", "Apache-2.0", only=("/publishedapi/",)),
    Source("ghc-doc", "BSD-3-Clause", only=("/users_guide/",), limit_mb=6),
    Source("imagemagick-6-doc", "ImageMagick", skip=("/api/",)),
    Source("krb5-doc", "MIT", limit_mb=2, held_out=True),
)
