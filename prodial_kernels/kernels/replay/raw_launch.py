"""Launching a compiled kernel without what Triton's JIT does before every launch.

``kernel[grid](...)`` binds and specialises the arguments, looks the kernel up and wraps every
tensor descriptor, about 100 µs of Python. Once that has happened, only addresses and the stream
differ from call to call: :class:`RawLaunch` keeps the rest. What the driver's C function takes
differs between versions of Triton, so it is not written down here: Triton's own launcher is run
once with a stand-in for that function, which keeps what it is given.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from torch import Tensor

# Maps kept for one descriptor: a model's activations come back to the same addresses.
MAPS = 1024


class UnsupportedLaunch(Exception):
    """A kernel that cannot be launched directly; the message says why."""


class RawLaunch:
    """One compiled kernel with its grid and every argument, addresses and stream left open.

    It may stand in for ``kernel[grid](*arguments)`` only where dtypes, shapes, strides, integers,
    constants, options, device and the alignment of every address are what they were: the kernel
    was specialised on them.

    Args:
        compiled: What ``kernel[grid](...)`` returned.
        grid: One to three numbers of programs.
        arguments: In the order of the kernel's parameters. Tensors and tensor descriptors are
            the open ones, in this order; they are not kept.

    Raises:
        UnsupportedLaunch: This Triton's launcher, or the kernel, needs more than addresses.
    """

    __slots__ = ("_arguments", "_compiled", "_descriptors", "_launch", "_nested", "_pointers",
                 "_stream")  # fmt: skip

    def __init__(self, compiled: Any, grid: Sequence[int], arguments: Sequence[Any]) -> None:
        launcher = _supported_launcher(compiled)
        given = _given_to_driver(launcher, compiled, grid, arguments)
        self._compiled = compiled  # unloads its module when it is deleted
        self._launch = _driver_function(launcher.launch)
        self._stream = _only_index(given, _STREAM)
        # By exact type: the last argument itself may be a constant that is a named tuple.
        self._nested = type(given[-1]) in (tuple, list)
        self._arguments = list(given[-1] if self._nested else given)
        if self._nested:
            self._launch = _with_head(self._launch, given[:-1], self._stream)

        maps = [i for i, value in enumerate(self._arguments) if _is_map(value)]
        metas = getattr(compiled.metadata, "tensordesc_meta", None) or []
        descriptors = [value for value in arguments if is_descriptor(value)]
        if not len(maps) == len(metas) == len(descriptors):
            raise UnsupportedLaunch(
                f"{len(descriptors)} tensor descriptors became {len(maps)} tensor maps"
            )
        opened = [v for v in arguments if isinstance(v, Tensor) or is_descriptor(v)]
        at = [i for i, value in enumerate(self._arguments) if isinstance(value, Tensor)]
        pointers = [i for i, value in enumerate(opened) if isinstance(value, Tensor)]
        if [id(self._arguments[i]) for i in at] != [id(opened[i]) for i in pointers]:
            raise UnsupportedLaunch("Triton's launcher rearranged the tensors")
        # (position in the arguments, number among the open ones).
        self._pointers = list(zip(at, pointers, strict=True))
        numbers = [i for i, value in enumerate(opened) if is_descriptor(value)]
        self._descriptors = [
            (position, number, _TensorMaps(descriptor, meta))
            for position, number, descriptor, meta in zip(
                maps, numbers, descriptors, metas, strict=True
            )
        ]
        for position in (*at, *maps):
            self._arguments[position] = None

    def bind(self, stream: int, addresses: Sequence[int]) -> Callable[[], None]:
        """Return the launch on a stream, by its handle, with the open arguments' addresses."""
        arguments = self._arguments.copy()
        for position, number in self._pointers:
            arguments[position] = addresses[number]
        for position, number, maps in self._descriptors:
            arguments[position] = maps[addresses[number]]
        if self._nested:
            return partial(self._launch, stream, arguments)
        arguments[self._stream] = stream
        return partial(self._launch, *arguments)


class _TensorMaps(dict[int, Any]):
    """The driver's tensor map of one descriptor by address: for the rest it is the same bytes."""

    def __init__(self, descriptor: Any, meta: Any) -> None:
        super().__init__()
        self._descriptor = copy.copy(descriptor)
        self._descriptor.base = None
        self._meta = meta

    def __missing__(self, address: int) -> Any:
        if len(self) >= MAPS:
            self.clear()
        at = copy.copy(self._descriptor)
        at.base = _Address(address)
        made = self[address] = _encoder()(at, self._meta)
        return made


def is_descriptor(value: object) -> bool:
    """Whether an argument is a tensor descriptor: Triton's, or Gluon's, which is another class."""
    return type(value).__name__ == "TensorDescriptor"


class _Address:
    """What a tensor descriptor's encoding asks of its base."""

    __slots__ = ("_address",)

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


_STREAM = object()


def _supported_launcher(compiled: Any) -> Any:
    """Return the compiled kernel's launcher object, if it is one that is known here."""
    launcher = getattr(compiled, "run", None)
    kind = type(launcher)
    if (kind.__module__, kind.__name__) != ("triton.backends.nvidia.driver", "CudaLauncher"):
        raise UnsupportedLaunch(f"its launcher is a {kind.__module__}.{kind.__name__}")
    for name in ("global_scratch_size", "profile_scratch_size"):
        if getattr(launcher, name, None) != 0:
            raise UnsupportedLaunch(f"its {name} is {getattr(launcher, name, None)}")
    if getattr(launcher, "gsan_enabled", False):
        raise UnsupportedLaunch("the GPU sanitiser is on")
    return launcher


def _given_to_driver(
    launcher: Any, compiled: Any, grid: Sequence[int], arguments: Sequence[Any]
) -> tuple[Any, ...]:
    """What Triton's launcher would pass to the driver's C function, without launching."""
    from triton.backends.nvidia import driver

    kept: list[tuple[Any, ...]] = []
    signature = dict(enumerate(compiled.src.signature.values()))
    shadow = copy.copy(launcher)
    shadow.launch = driver.wrap_handle_tensordesc(
        lambda *given: kept.append(given),
        signature,
        getattr(compiled.metadata, "tensordesc_meta", None),
    )
    full = (*grid, 1, 1)[:3]
    shadow(
        *full, _STREAM, compiled.function, compiled.packed_metadata, None, None, None, *arguments
    )
    (given,) = kept
    return given


def _driver_function(launch: Any) -> Callable[..., None]:
    """The C function that a launcher calls, under the wrapper for tensor descriptors."""
    if inspect.isbuiltin(launch):
        return launch
    names = launch.__code__.co_freevars
    function = launch.__closure__[names.index("launcher")].cell_contents
    if not inspect.isbuiltin(function):
        raise UnsupportedLaunch(f"the driver's launch function is a {type(function).__name__}")
    return function


def _with_head(
    launch: Callable[..., None], head: Sequence[Any], stream_at: int
) -> Callable[[int, list[Any]], None]:
    """Triton 3.9 takes the kernel's arguments as one tuple after its own."""
    before, after = head[:stream_at], head[stream_at + 1 :]
    return lambda stream, arguments: launch(*before, stream, *after, arguments)


def _only_index(values: Sequence[Any], wanted: object) -> int:
    (index,) = (i for i, value in enumerate(values) if value is wanted)
    return index


def _is_map(value: object) -> bool:
    return type(value).__name__ == "PyCUtensorMap"


@cache
def _encoder() -> Callable[[Any, Any], Any]:
    """(descriptor, what the compiler says of it) -> the driver's tensor map."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    # Since 3.7 with the launch's other arguments, which it does not read.
    more = [None] * (len(inspect.signature(make_tensordesc_arg).parameters) - 2)
    return lambda descriptor, meta: make_tensordesc_arg(descriptor, meta, *more)[0]
