"""What importing the package costs, which way its imports go, and rules that every file keeps."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import prodial_kernels

PACKAGE = "prodial_kernels"
ROOT = Path(prodial_kernels.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Each part may import itself and the parts before it. A new part goes where it belongs.
ORDER = (
    "_version", "_checks", "files", "_validation", "module_patterns",
    "module_tree", "methods", "config", "upstream", "kernels", "ops", "functional", "testing",
    "quantization", "merged_weight", "scale_versions", "tuners", "linear", "embedded", "models",
    "checkpoint", "peft", "training", "captured", "search", "cli", "__main__", "embedded.making",
)  # fmt: skip


def name_of(path: Path) -> str:
    parts = [PACKAGE, *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """What a file consists of."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@cache
def imports(path: Path) -> tuple[tuple[ast.AST, str], ...]:
    """Every import of this package, wherever in the file, as the module it loads."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[tuple[ast.AST, str]]:
    for node in nodes(path):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module and node.module.split(".")[0] == PACKAGE:
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    yield node, submodule if submodule in MODULES else node.module


def part_of(module: str) -> str:
    # A program that made the embedded model and trains as the package does; not in the wheel.
    if module.startswith(f"{PACKAGE}.embedded.making"):
        return "embedded.making"
    return module.split(".")[1] if "." in module else ""


def part_in(module: str, folder: str) -> str | None:
    """The file or folder of a package that a module is or is in; None elsewhere."""
    return module[len(folder) + 1 :].split(".")[0] if module.startswith(f"{folder}.") else None


# --- Importing. ---------------------------------------------------------------------------------

PROBE = """
import json, sys
import torch
before = set(sys.modules)
import prodial_kernels
for name in prodial_kernels.__all__:
    getattr(prodial_kernels, name)
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_import_loads_the_package_alone() -> None:
    """Beyond torch: no triton, no transformers, not torch's compiler, which take seconds each."""
    output = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True
    ).stdout
    loaded = set(json.loads(output))
    libraries = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"torch"}
    assert libraries == {"prodial_kernels", "safetensors"}
    assert not loaded & {"torch._dynamo", "torch._inductor", "sympy"}


def test_public_names() -> None:
    assert sorted(prodial_kernels.__all__) == list(prodial_kernels.__all__)
    for name in prodial_kernels.__all__:
        assert getattr(prodial_kernels, name).__doc__
        assert name in dir(prodial_kernels)
    with pytest.raises(AttributeError, match="no attribute 'prodial_convolution'"):
        prodial_kernels.prodial_convolution  # noqa: B018


# --- The direction of imports. ------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_one_way(module: str) -> None:
    own = part_of(module)
    if not own:
        return
    assert own in ORDER, f"{own} has no place in ORDER"
    for node, imported in imports(MODULES[module]):
        where = f"{MODULES[module]}:{node.lineno}"
        part = part_of(imported)
        if not part:
            raise AssertionError(f"{where}: the package itself stands above everything")
        assert imported in MODULES, f"{where}: {imported} does not exist"
        assert ORDER.index(part) <= ORDER.index(own), f"{where}: {own} must not import {part}"


def test_no_cycles_among_the_parts_of_any_folder() -> None:
    """A folder is read from below: what it holds, files and folders, stands in one order."""
    for folder in {path.parent for path in FILES} - {ROOT}:
        above = name_of(folder / "__init__.py")
        graph: dict[str, set[str]] = defaultdict(set)
        for module, path in MODULES.items():
            own = part_in(module, above)
            if own is None:
                continue
            parts = {part_in(imported, above) for _, imported in imports(path)}
            graph[own] |= {part for part in parts if part not in {None, own}}
        TopologicalSorter(graph).prepare()


def test_no_cycles_among_files() -> None:
    graph = {
        module: {imported for _, imported in imports(path) if part_of(imported)} - {module}
        for module, path in MODULES.items()
    }
    # Raises CycleError, which names the cycle.
    TopologicalSorter(graph).prepare()


# --- Rules for every file. ----------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_rules(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 600
    for node in nodes(path):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        # python -O removes assert statements.
        assert not isinstance(node, ast.Assert), f"{where}: assert"
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names]
            modules += [getattr(node, "module", None) or ""]
            names = {name.split(".")[0] for name in modules}
            assert not names & {"pickle", "cPickle", "dill", "marshal", "shelve"}, where
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            call = (node.value.id, node.attr)
            assert call not in {("torch", "load"), ("torch", "save")}, f"{where}: pickle"


@pytest.mark.parametrize("tree", [PACKAGE, "benchmarks", "tests"])
def test_no_folder_holds_too_many_files(tree: str) -> None:
    files = Counter(path.parent for path in (ROOT.parent / tree).rglob("*.py"))
    assert len(files) > 5
    assert {folder: n for folder, n in files.items() if n > 15} == {}


def test_there_is_something_to_check() -> None:
    assert {"linear", "functional", "ops", "checkpoint", "models"} <= {
        part_of(module) for module in MODULES
    }
    assert len(FILES) > 20
    assert sum(1 for path in FILES for _ in imports(path)) > 50
