"""What of other libraries' insides the package's sources name."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

LIBRARIES = ("transformers", "mamba_ssm", "causal_conv1d", "selective_scan_cuda", "accelerate",
             "peft", "bitsandbytes", "liger_kernel", "triton", "torch")  # fmt: skip

# What of these is for everybody; so is all of torch whose name has no underscore.
_PUBLIC = ("triton.language",)
# Of Python's own functions: what reads or copies the code of somebody else's.
_OF_FUNCTIONS = {"__code__", "__closure__", "__globals__", "__wrapped__", "__defaults__",
                 "__kwdefaults__"}  # fmt: skip
# Of every module and tensor, whatever else has such a name in another file.
_OF_TORCH = {name for name in (*dir(nn.Module()), *dir(Tensor)) if re.match("_[A-Za-z]", name)}
# What a method of PEFT's overrides.
_OF_PEFT = {n for n in (*dir(LoraModel), *dir(BaseTunerLayer)) if re.match("_[A-Za-z]", n)}
# Of named tuples, where the underscore keeps names free.
_OF_TUPLES = {"_fields", "_replace", "_asdict", "_make"}
# Where a string may be the name of an attribute.
_NAMING = ast.Call | ast.Subscript | ast.Compare | ast.Tuple | ast.Assign
# Beginnings of files' names, and endings of others.
_NO_ATTRIBUTES = {"_sysconfigdata", "_REPEAT"}
# Modules that are private or gone in some release.
_MODULES = {"dis", "sre_parse", "selective_scan_cuda"}
_PRIVATE = re.compile(r"_(?!prodial)[A-Za-z][A-Za-z0-9_]*[A-Za-z0-9]")


@cache
def private_uses(root: Path) -> dict[str, set[str]]:
    """Every private name and submodule of a library in the sources below ``root``, by file."""
    trees = {path: ast.parse(path.read_text("utf-8")) for path in sorted(root.rglob("*.py"))}
    defined = {path: set(_defined(tree)) for path, tree in trees.items()}
    anywhere = set().union(*defined.values())
    found: dict[str, set[str]] = defaultdict(set)
    for path, tree in trees.items():
        ours = _OF_TUPLES | _NO_ATTRIBUTES | defined[path] | (anywhere - _OF_TORCH)
        for name in _named(tree):
            private = _PRIVATE.fullmatch(name) and name not in ours
            if private or name in _OF_FUNCTIONS or _is_submodule(name):
                found[name].add(str(path.relative_to(root)))
        for name in (*_overridden(tree), *_imported(tree)):
            found[name].add(str(path.relative_to(root)))
    return dict(found)


def _named(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, _NAMING):
            # getattr(x, "_y"), x["_y"], "_y" in x, constants and tables of names.
            for part in ast.iter_child_nodes(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (alias.name for alias in node.names)


def _is_submodule(name: str) -> bool:
    if name in _MODULES:
        return True
    parts = name.split(".")
    if parts[0] == "torch" and not any(part.startswith("_") for part in parts):
        return False
    return (
        len(parts) > 1
        and parts[0] in LIBRARIES
        and name not in _PUBLIC
        and all(part.isidentifier() for part in parts)
    )


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            # On an object of its own, not on somebody else's.
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "ctx", "kept"):
                yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def _imported(tree: ast.Module) -> Iterator[str]:
    """Private names that are imported from elsewhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("prodial_"):
            yield from (alias.name for alias in node.names if _PRIVATE.fullmatch(alias.name))


def _overridden(tree: ast.Module) -> Iterator[str]:
    """Private methods of others' classes that a class of ours overrides."""
    for cls in ast.walk(tree):
        if isinstance(cls, ast.ClassDef):
            for node in cls.body:
                if isinstance(node, ast.FunctionDef) and node.name in _OF_TORCH | _OF_PEFT:
                    yield node.name
