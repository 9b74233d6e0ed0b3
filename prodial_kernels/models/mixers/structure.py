"""Whether upstream's code is what the policies assume; read from its bytecode, never run.

A policy that computes upstream's forward in another way would silently leave out a part, a method
or an argument that a later release adds. So the names that a forward reads are compared with the
known ones, once, when adapters are applied.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from prodial_kernels.models.mixers.arguments import could_be_cache, parameters_of


def forward_of(module: nn.Module) -> tuple[type, Callable[..., Any]]:
    """Return the class that defines the forward of ``module``, and that function."""
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return owner, vars(owner)["forward"]


def code_of(function: Any) -> CodeType | None:
    """Return the code of a function below its decorators; None if it is not written in Python."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code if isinstance(code, CodeType) else None


def names_in(function: Any) -> frozenset[str]:
    """Return the names of globals and attributes in a function, below its decorators."""
    code = code_of(function)
    return frozenset() if code is None else frozenset(code.co_names)


def global_of(function: Any, name: str) -> Any:
    """Return the current value of a global of a function's module, or None."""
    return getattr(inspect.unwrap(function), "__globals__", {}).get(name)


_METADATA = frozenset(
    ("device", "dtype", "shape", "ndim", "size", "is_cuda", "requires_grad", "numel")
)


@cache
def times_read(function: Callable[..., Any], name: str) -> int:
    """Count how often a function's own code reads an attribute of that name."""
    code = code_of(function)
    return 0 if code is None else list(attribute_reads(code)).count(name)


def attribute_reads(code: CodeType) -> Iterator[str | None]:
    """Yield what each instruction reads: an attribute's name, or None for any other instruction."""
    for instruction in dis.get_instructions(code):
        reads = instruction.opname in ("LOAD_ATTR", "LOAD_METHOD")
        yield instruction.argval if reads else None


def unknown_in(
    mixer: nn.Module,
    forward: Callable[..., Any],
    *,
    parts: Iterable[str],
    known: Iterable[str] = (),
) -> str | None:
    """Say which part of a mixer's forward is unknown, or return None.

    Args:
        mixer: Whose forward it is.
        forward: The function itself, below any policy.
        parts: Children, parameters and buffers that it must have.
        known: Others that it may have, and its methods that are known.
    """
    parts = list(parts)
    missing = [name for name in parts if not hasattr(mixer, name)]
    if missing:
        return f"it has no {', '.join(missing)}"
    for name in sorted(names_in(forward) - {*parts, *known}):
        what = getattr(mixer, name, None)
        if isinstance(what, nn.Module | Tensor):
            return f"its forward reads {name}, which is unknown"
        own = getattr(type(mixer), name, None)
        if isinstance(own, FunctionType) and getattr(nn.Module, name, None) is not own:
            return f"its forward calls {name}(), which is unknown"
    for name in parameters_of(forward)[1:]:
        if not (could_be_cache(name) or "mask" in name):
            return f"its forward takes {name}, which is unknown"
    return None


def weight_reads(cls: type[nn.Module], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (method, name) wherever the class reads ``self.<name>.weight`` for its values.

    Reads of its device, dtype or shape do not count, nor what happens in ``__init__``.
    """
    wanted = set(names)
    if not wanted:
        return
    for base in cls.__mro__:
        if base is nn.Module or base.__module__.startswith("torch."):
            continue
        for method, member in vars(base).items():
            # Overridden methods do not run.
            if method == "__init__" or getattr(cls, method, None) is not member:
                continue
            code = code_of(member) if isinstance(member, FunctionType) else None
            if code is not None:
                for name in _reads(code):
                    if name in wanted:
                        yield method, name


# Asked for every module of a model, of which hundreds share a class.
@cache
def _reads(code: CodeType) -> tuple[str, ...]:
    attributes = list(attribute_reads(code))
    shifted = zip(attributes, attributes[1:], [*attributes[2:], None], strict=False)
    found = [
        name
        for name, then, after in shifted
        if name is not None and then == "weight" and after not in _METADATA
    ]
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found += _reads(constant)
    return tuple(found)
