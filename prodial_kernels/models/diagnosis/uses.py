"""How a module uses a child: by calling it, or by its weight, and on which of its paths.

An adapter that another library puts around a layer acts when the layer is called. Where a mixer
hands ``self.out_proj.weight`` to a kernel instead, the adapter is passed by: it gets no gradient
and changes nothing until it is merged. That is read off the source of ``forward``, which is never
run.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

# A branch on one of these is the fused path of a mixer, which training takes.
_FUSED = ("training", "use_fast_path", "use_mem_eff_path", "fast_path_available")
# A branch on one of these is not taken while a dense model trains.
_NOT_IN_TRAINING = ("_is_quantized", "inference_params", "cache_params")
_METADATA = frozenset(("device", "dtype", "shape", "ndim", "size", "is_cuda", "requires_grad"))


@dataclass(frozen=True)
class Use:
    """What a class does with one of its children.

    Attributes:
        read_when_fused: Its weight is read on the fused path.
        read: Its weight is read elsewhere.
        called: It is called, on a path that training may take.
    """

    read_when_fused: bool = False
    read: bool = False
    called: bool = False

    @property
    def dead_when_fused(self) -> bool:
        """Whether an adapter around the child has no effect where the fused kernels run."""
        return self.read_when_fused or self.dead

    @property
    def dead(self) -> bool:
        """Whether it has no effect on any path, before it is merged."""
        return self.read and not self.called


def use_of(parent: nn.Module, child: str) -> Use:
    """Return what the class of ``parent`` does with the child called ``child``.

    A child that is neither called nor read by name, as in a list of modules, counts as called.
    """
    cls: Any = type(parent)  # mypy holds that classes of modules cannot be hashed
    found = _uses(cls).get(child)
    return Use(called=True) if found is None else found


@cache
def _uses(cls: Any) -> dict[str, Use]:
    walker = _Walker(cls)
    walker.method("forward", fused=False)
    names = walker.fused_reads | walker.reads | walker.calls
    return {
        name: Use(name in walker.fused_reads, name in walker.reads, name in walker.calls)
        for name in names
    }


class _Walker:
    """Follows ``forward``, and the methods that it calls, through their branches."""

    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls = cls
        self.fused_reads: set[str] = set()
        self.reads: set[str] = set()
        self.calls: set[str] = set()
        self._seen: set[tuple[str, bool]] = set()

    def method(self, name: str, *, fused: bool) -> None:
        function = inspect.unwrap(getattr(self.cls, name, None) or _nothing)
        if (name, fused) in self._seen or not isinstance(function, FunctionType):
            return
        self._seen.add((name, fused))
        if function.__module__ == nn.Module.__module__:
            return
        tree = _parsed(function)
        for statement in tree.body if tree is not None else ():
            self._visit(statement, fused)

    def _visit(self, node: ast.AST, fused: bool) -> None:
        if isinstance(node, ast.If | ast.IfExp):
            self._visit(node.test, fused)
            names = set(_names(node.test))
            taken = not names & {*_NOT_IN_TRAINING} or bool(names & {*_FUSED})
            for part in _parts(node.body) if taken else ():
                self._visit(part, fused or bool(names & {*_FUSED}))
            for part in _parts(node.orelse):
                self._visit(part, fused)
            return
        if isinstance(node, ast.Call):
            child = _of_self(node.func)
            if child is not None:
                if isinstance(getattr(self.cls, child, None), FunctionType):
                    self.method(child, fused=fused)
                else:
                    self.calls.add(child)
        if isinstance(node, ast.Attribute) and node.attr in _METADATA:
            inner = node.value
            if isinstance(inner, ast.Attribute) and inner.attr == "weight":
                return
        if isinstance(node, ast.Attribute) and node.attr == "weight":
            child = _of_self(node.value)
            if child is not None:
                (self.fused_reads if fused else self.reads).add(child)
        for part in ast.iter_child_nodes(node):
            self._visit(part, fused)


def _nothing() -> None:
    """Stands for a method that a class has not."""


def _parsed(function: FunctionType) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    found = tree.body[0] if tree.body else None
    return found if isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef) else None


def _parts(body: list[ast.stmt] | ast.expr) -> list[ast.AST]:
    return [*body] if isinstance(body, list) else [body]


def _names(test: ast.AST) -> Iterator[str]:
    """Yield the names, attributes and strings in a condition."""
    for node in ast.walk(test):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _of_self(node: ast.AST) -> str | None:
    """Return X of ``self.X``, or None."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr if node.value.id == "self" else None
    return None
