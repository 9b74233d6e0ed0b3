"""The launches of one call, recorded once and replayed for every call like it.

Between two calls whose operands agree in shape, strides, dtype, alignment and device and whose
options are equal, all that the launchers compute is the same: grids, tile sizes, constants, the
sizes of temporaries. Only addresses and the stream differ. So :func:`replayed` runs a function as
it is until such a call comes back, then keeps a :class:`Recording` of what it launches and
allocates; from then on it fills in the addresses and calls the driver. Nothing that Triton
specialises a kernel on can differ under one key, because all of it is computed from what the key
holds.

A function can be recorded if it only allocates, makes views and launches by :func:`launch`;
whatever else it does with tensors, such as a library product, is seen, and then it is always run as
it is. So it is for the CPU, on a Triton whose launcher is not known, and while a launch hook is
set; :func:`obstacles` tells.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton import knobs

from prodial_kernels.kernels.replay.recorder import Function, Recorder, recorder
from prodial_kernels.kernels.replay.recording import Recording

# Recordings kept, and calls remembered: a training run has one of each per shape and direction.
RECORDINGS = 512

Result = TypeVar("Result", bound=Sequence[Tensor | None])

_logger = logging.getLogger(__name__)
_lock = threading.Lock()
# None for a call that cannot be recorded.
_recordings: dict[Hashable, Recording | None] = {}
_met: dict[Hashable, None] = {}
_obstacles: dict[str, None] = {}


def replayed(
    function: Callable[..., Result], tensors: Sequence[Tensor | None], options: tuple[Hashable, ...]
) -> Result:
    """``function(*tensors, *options)``, from a recording where there is one for such a call.

    The first tensor's device is made the current one, on which Triton launches.

    Args:
        function: Returns new tensors, or None for some.
        tensors: On one device; None for those not given, but the first has to be.
        options: What else the result depends on, hashable.
    """
    first = tensors[0]
    if first is None:
        raise ValueError("tensors: the first, which says on which device to launch, is None")
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device_of(first):
            return replayed(function, tensors, options)
    if not replayable(first) or hooked() or recorder() is not None:
        return function(*tensors, *options)

    key, addresses = call_key(function, tensors, options)
    recording = _recordings.get(key)
    if recording is not None:
        return recording.replay(addresses)  # type: ignore[return-value]
    if key in _recordings or first.numel() == 0:
        return function(*tensors, *options)
    if key not in _met:
        # Recording takes longer than launching: worth it for a call that comes back.
        _put(_met, key, None)
        return function(*tensors, *options)
    watching = Recorder(tensors)
    result = watching.run(function, options)
    recording = watching.recording(result)
    if not watching.ambiguous:
        _put(_recordings, key, recording)
        if watching.obstacle is not None:
            _report(watching.obstacle)
    return result


def call_key(
    function: Function, tensors: Sequence[Tensor | None], options: tuple[Hashable, ...]
) -> tuple[Hashable, list[int]]:
    """Return what calls have in common that one recording is for, and the operands' addresses.

    The tensors' device is the first one's. Addresses divide by 16 unless the key says otherwise.
    """
    addresses = []
    first = tensors[0]
    described: list[Hashable] = [function, None if first is None else first.get_device(), options]
    misaligned = 0
    for tensor in tensors:
        if tensor is None:
            addresses.append(0)
            described.append(None)
        else:
            address = tensor.data_ptr()
            addresses.append(address)
            described.append((tensor.shape, tensor.stride(), tensor.dtype))
            misaligned |= address
    if misaligned & 15:
        described.append(tuple(address & 15 for address in addresses))
    return tuple(described), addresses


def replayable(tensor: Tensor) -> bool:
    """Whether calls with this operand first are recorded: a plain CUDA tensor, no subclass."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_cuda


def _put(into: dict[Hashable, Any], key: Hashable, value: Any) -> None:
    """Add an entry; the oldest makes way."""
    with _lock:
        if len(into) >= RECORDINGS:
            del into[next(iter(into))]
        into[key] = value


def _report(obstacle: str) -> None:
    if obstacle not in _obstacles:
        _obstacles[obstacle] = None
        _logger.warning("some calls are launched by Triton's JIT, which is slower: %s", obstacle)


def reset() -> None:
    """Forget every recording and obstacle: for whoever changes what launchers choose."""
    with _lock:
        _recordings.clear()
        _met.clear()
        _obstacles.clear()


def counts() -> dict[str, int]:
    """How many calls are ``"replayed"``, cannot be (``"run"``), and were ``"met"`` so far."""
    replays = sum(recording is not None for recording in _recordings.values())
    return {"replayed": replays, "run": len(_recordings) - replays, "met": len(_met)}


def hooked() -> bool:
    """Whether someone watches launches, such as a profiler: Triton has to make them itself."""
    for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False


def obstacles() -> list[str]:
    """Why some calls are launched by Triton's JIT every time; empty where all are replayed."""
    return list(_obstacles)
