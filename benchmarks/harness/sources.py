"""Which files of this repository others need: what they import, and what that imports in turn.

Read from the sources, nothing is imported. What counts is an import anywhere in a file, the
``__init__`` of every package on the way, the public names that an ``__init__`` loads when they are
first used (its ``_HOMES``), and a module named in a string of its own, as for ``python -m`` or
:func:`importlib.import_module`.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Packages of this repository, and the folder that each is imported from.
PACKAGES = {"prodial_kernels": ".", "benchmarks": ".", "support": "tests"}
_MODULE = re.compile(rf"({'|'.join(PACKAGES)})(\.\w+)+(:\w+)?")


def gpu_test_files(root: Path = ROOT) -> list[Path]:
    """The files with tests that need a GPU, and the ``conftest.py`` beside or above each."""
    tests = root / "tests"
    marked = [
        path
        for path in sorted(tests.rglob("test_*.py"))
        if tests / "gpu" in path.parents or _marks_gpu(path.read_text(encoding="utf-8"))
    ]
    folders = {folder for path in marked for folder in path.parents if folder.is_relative_to(tests)}
    settings = (folder / "conftest.py" for folder in sorted(folders))
    return [*(path for path in settings if path.exists()), *marked]


def needed(files: Iterable[Path], root: Path = ROOT) -> list[Path]:
    """Return ``files`` and every file of the repository at ``root`` that they need, sorted."""
    found: set[Path] = set()
    waiting = list(files)
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        package = _package_of(path, root)
        for name in _named(path.read_text(encoding="utf-8"), package):
            waiting += _files_of(name, root)
    return sorted(found)


def hash_of(files: Iterable[Path], root: Path = ROOT) -> str:
    """SHA-256 over the files, each with its path under ``root``."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def _package_of(path: Path, root: Path) -> str:
    """The dotted name of the package whose ``__init__`` a file is; an empty string for others."""
    if path.name != "__init__.py":
        return ""
    parts = path.parent.relative_to(root).parts
    return ".".join(parts[1:] if parts[0] == "tests" else parts)


def _files_of(module: str, root: Path) -> Iterator[Path]:
    """The files that importing ``module`` runs; the end of its name may be no module."""
    package, *rest = module.split(".")
    if package not in PACKAGES:
        return
    folder = root / PACKAGES[package] / package
    yield folder / "__init__.py"
    for part in rest:
        if (file := folder / f"{part}.py").is_file():
            yield file
        folder /= part
        if not (folder / "__init__.py").is_file():
            return
        yield folder / "__init__.py"


def _marks_gpu(text: str) -> bool:
    """Whether a file's text has ``pytest.mark.gpu`` outside its strings."""
    return "mark.gpu" in text and any(
        isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.gpu"
        for node in ast.walk(ast.parse(text))
    )


@cache
def _named(text: str, package: str) -> frozenset[str]:
    """Every module that a file's text names; of ``from a import b`` both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import():
                names.update(alias.name for alias in node.names)
            case ast.ImportFrom(module=str(module)):
                names.update(f"{module}.{alias.name}" for alias in node.names)
            case ast.Assign(targets=[ast.Name(id="_HOMES")], value=ast.Dict(values=homes)):
                names.update(f"{package}.{ast.literal_eval(home)}" for home in homes)
            case ast.Constant(value=str(value)) if _MODULE.fullmatch(value):
                names.add(value.partition(":")[0])
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                names.update(_run_by_name(parts))
    return frozenset(names)


def _run_by_name(parts: list[ast.expr]) -> Iterator[str]:
    """The modules that ``["-m", "name"]`` runs; of a package its ``__main__``."""
    values = [part.value if isinstance(part, ast.Constant) else None for part in parts]
    for option, name in pairwise(values):
        if option == "-m" and isinstance(name, str):
            yield f"{name}.__main__"
