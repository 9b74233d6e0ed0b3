"""A CUDA driver without a device, which keeps the bytes of every launch that reaches it.

Above it everything is real: Triton compiles, builds its launcher and calls it, and the launches
can be compared down to each parameter. Tensors are the CPU's; nothing reads them.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.runtime.driver import driver

HERE = Path(__file__).resolve().parent
STREAM = 7
_POINTER, _MAP, _VALUE = "pointer", "map", "value"
_BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "fp32": 4, "fp64": 8, "u64": 8}


@dataclass(frozen=True)
class DriverLaunch:
    """What one launch handed to the driver.

    Attributes:
        setting: Function, stream, grid, threads and shared memory.
        parameters: (kind, address, what else was in it): a pointer, a tensor map, or a value.
    """

    setting: tuple[int, ...]
    parameters: tuple[tuple[str, int, bytes], ...]


class _Record(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_uint64), ("stream", ctypes.c_uint64), ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32), ("shared", ctypes.c_uint32), ("size", ctypes.c_uint32),
        ("bytes", ctypes.c_uint8 * 4096),
    )  # fmt: skip


class StandInDriver:
    """Built and loaded in ``folder``, then Triton's active driver; a Hopper to whoever asks."""

    def __init__(self, folder: Path) -> None:
        library = folder / "libcuda.so.1"
        nvidia = Path(triton.__file__).parent / "backends" / "nvidia"
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O1", f"-I{nvidia / 'include'}", "-Wl,-soname,libcuda.so.1",
             "-o", library, HERE / "stand_in_driver.c"],
            check=True,
        )  # fmt: skip
        # Whoever opens it by name gets the one that is loaded.
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self._library.stand_in_record.restype = ctypes.POINTER(_Record)
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

        class Driver(CudaDriver):
            def __init__(self) -> None:
                self.utils = CudaUtils()
                self.launcher_cls = CudaLauncher
                self.get_current_device = lambda: 0
                self.get_current_stream = lambda _: STREAM
                self.get_device_capability = lambda _: (9, 0)

        driver.set_active(Driver())
        self._layouts: dict[int, list[tuple[str, int]]] = {}

    def learn(self, kernels: Iterable[Any]) -> None:
        """Read the parameters of every compiled version of ``kernels``: their bytes are kept."""
        for kernel in kernels:
            for compiled in kernel.device_caches[0][0].values():
                layout = [
                    part for kind in compiled.src.signature.values() for part in _layout(kind)
                ]
                # Scratch memory for the kernel and for a profiler.
                layout += [(_POINTER, 8)] * 2
                self._layouts[compiled.function] = layout
                sizes = (ctypes.c_uint32 * len(layout))(*(size for _, size in layout))
                function = ctypes.c_uint64(compiled.function)
                self._library.stand_in_parameters(function, len(layout), sizes)

    def taken(self) -> list[DriverLaunch]:
        """Return the launches since the last call."""
        launches = [
            self._read(self._library.stand_in_record(index).contents)
            for index in range(self._library.stand_in_count())
        ]
        self._library.stand_in_clear()
        return launches

    def _read(self, record: _Record) -> DriverLaunch:
        held = bytes(record.bytes[: record.size])
        parameters, at = [], 0
        for kind, size in self._layouts.get(record.function, ()):
            value = held[at : at + size]
            at += size
            address = int.from_bytes(value[:8], "little") if kind != _VALUE else 0
            parameters.append((kind, address, value[8:] if kind != _VALUE else value))
        setting = (record.function, record.stream, *record.grid, record.block, record.shared)
        return DriverLaunch(setting, tuple(parameters))


def _layout(kind: str) -> list[tuple[str, int]]:
    """Kind and bytes of the kernel parameters that an argument of a Triton type becomes."""
    if kind == "constexpr":
        return []
    if kind.startswith("*"):
        return [(_POINTER, 8)]
    if kind.startswith("tensordesc"):
        rank = re.findall(r"\[([^]]*)\]", kind)[0].count(",") + 1
        return [(_MAP, 128), *[(_VALUE, 4)] * rank, *[(_VALUE, 8)] * rank]
    return [(_VALUE, _BYTES[kind])]
