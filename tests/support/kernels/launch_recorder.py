"""Records what the launchers ask Triton to compile, for a device that is not there.

Triton sees a driver that reports the wanted architecture, and torch hands out tensors without
memory that say they are on it, so every launcher takes the path that it takes on that device, down
to the specialisation of each argument. Only the compiler is replaced: what reaches it is kept
instead.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from prodial_kernels.kernels.replay import streams


@dataclass(frozen=True)
class Device:
    """A GPU that a launcher may meet.

    Attributes:
        name: For reports.
        arch: Compute capability, 10 * major + minor.
        processors: Number of multiprocessors.
        shared_limit: Shared memory that one program may use, in KiB.
    """

    name: str
    arch: int
    processors: int
    shared_limit: int


# Limits: CUDA C Programming Guide, "Technical Specifications per Compute Capability". Launchers
# do not tell an A100 (163 KiB) from the other Ampere and Ada GPUs, so theirs is what counts.
DEVICES = {
    device.arch: device
    for device in (
        Device("Ampere", 80, 108, 99),
        Device("RTX A6000", 86, 84, 99),
        Device("Ada", 89, 128, 99),
        Device("H100", 90, 132, 227),
        Device("B200", 100, 148, 227),
        Device("RTX 5090", 120, 170, 99),
    )
}


@dataclass
class Launch:
    """One thing to compile: a kernel's source, specialised, and the compiler's options.

    Attributes:
        device: Where it would run.
        source: What ``triton.compile`` takes.
        options: Its options.
        origin: The first that asked for it, as the caller set it on the recorder.
    """

    device: Device
    source: Any
    options: dict[str, Any]
    origin: Any

    @property
    def kernel(self) -> str:
        """The kernel's name."""
        return str(self.source.fn.__name__)

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time constants by name, those of a named tuple by its fields."""
        names = self.source.fn.arg_names
        return flat({names[path[0]]: value for path, value in self.source.constants.items()})

    @property
    def dtype(self) -> str:
        """Triton's name of the compute dtype."""
        kinds = {str(kind) for kind in self.source.signature.values()}
        return "fp16" if any("fp16" in kind for kind in kinds) else "bf16"

    @property
    def title(self) -> str:
        """The kernel with everything that distinguishes this launch of it."""
        constants = {k: v for k, v in self.constants.items() if v is not None and v is not False}
        listed = " ".join(f"{k}={v}" for k, v in constants.items() if k.isupper())
        absent = [k.removesuffix("_ptr") for k, v in self.constants.items() if v is None]
        warps, stages = self.options["num_warps"], self.options["num_stages"]
        named = f"sm_{self.device.arch} {self.kernel} {self.dtype}"
        without = f" without {','.join(absent)}" if absent else ""
        return f"{named} {listed} warps={warps} stages={stages}{without}"


def flat(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a launch, with the fields of named tuples, in capitals, in their place."""
    found = {}
    for name, value in arguments.items():
        fields = value._asdict() if hasattr(value, "_asdict") else None
        found |= {name: value} if fields is None else {k.upper(): v for k, v in fields.items()}
    return found


_device_numbers = itertools.count()


class Recorder:
    """Collects the launches of whatever runs inside :meth:`on`."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.origin: Any = None
        self._seen: set[tuple[Any, ...]] = set()

    @contextlib.contextmanager
    def on(self, device: Device) -> Iterator[None]:
        """Pretend that the current device is ``device`` and record what is launched."""
        major, minor = divmod(device.arch, 10)
        properties = SimpleNamespace(
            name=device.name, major=major, minor=minor,
            multi_processor_count=device.processors,
            shared_memory_per_block_optin=device.shared_limit * 1024,
        )  # fmt: skip
        target = GPUTarget("cuda", device.arch, 32)
        # Triton remembers by device what it has compiled: to it each recording is a new one.
        index = next(_device_numbers)
        stub = SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: index,
            get_current_stream=lambda _: 0,
            get_active_torch_device=lambda: torch.device("cuda", 0),
        )

        def keep(source: Any, target: Any = None, options: Any = None, **_: Any) -> Any:
            key = (device.arch, source.hash(), tuple(sorted(map(repr, options.items()))))
            if key not in self._seen:
                self._seen.add(key)
                self.launches.append(Launch(device, source, dict(options), self.origin))
            return _Anything()

        with contextlib.ExitStack() as stack:
            previous = driver._active
            driver.set_active(stub)
            stack.callback(lambda: setattr(driver, "_active", previous))
            for owner, name, replacement in (
                (triton.compiler, "compile", keep),
                (torch.cuda, "get_device_properties", lambda *_: properties),
                (torch.cuda, "get_device_capability", lambda *_: (major, minor)),
                (torch.cuda, "current_device", lambda: 0),
                (torch.cuda, "device", lambda *_: contextlib.nullcontext()),
                (torch.cuda, "stream", lambda *_: contextlib.nullcontext()),
                (torch.cuda, "current_stream", _Anything),
                (streams, "current_handle", lambda _: 0),
                (torch.cuda, "Stream", _Anything),
                (torch.cuda, "Event", _Anything),
            ):
                stack.enter_context(mock.patch.object(owner, name, replacement))
            stack.enter_context(_TensorsOnTheDevice())
            yield


class _Anything:
    """A compiled kernel, a stream, an event: takes every call and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.__name__ = "anything"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> _Anything:
        return self


class _TensorsOnTheDevice(TorchFunctionMode):
    """Makes what torch makes a tensor without memory, which says that it is on the first GPU.

    Takes a fraction of the time of torch's fake tensors, which was most of a recording's.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if (answer := _ANSWERS.get(function)) is not None:
            return answer(*args, **(kwargs or {}))
        if kwargs and "device" in kwargs:
            kwargs = {**kwargs, "device": "meta"}
        return function(*args, **(kwargs or {}))


def _data_ptr(tensor: Tensor) -> int:
    """An address as aligned as the allocator's would be; launchers test it for the copy engine."""
    return (1 << 20) + tensor.storage_offset() * tensor.element_size()


def _empty_like(tensor: Tensor, **options: Any) -> Tensor:
    """``torch.empty_like``, which is slow without memory."""
    if tensor.is_contiguous():
        return torch.empty(tensor.shape, **{"dtype": tensor.dtype, **options, "device": "meta"})
    return torch.empty_like(tensor, **options)


# What tensors say of themselves on a device, and what need not be done for one without memory.
_ANSWERS = {
    torch.empty_like: _empty_like,
    Tensor.addmm_: lambda tensor, *_, **__: tensor,
    Tensor.device.__get__: lambda _: torch.device("cuda", 0),
    Tensor.is_cuda.__get__: lambda _: True,
    Tensor.get_device: lambda _: 0,
    Tensor.data_ptr: _data_ptr,
    Tensor.record_stream: lambda *_: None,
}
