"""Which implementation a call takes, why, and the check that ``impl="auto"`` makes first."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from prodial_kernels._checks import IMPLS, check_choice
from prodial_kernels._validation import TRITON_DTYPES, device_capability
from prodial_kernels.kernels.choices.tile_sizes import COMPILED_FOR
from prodial_kernels.kernels.projector.operands import Impl
from prodial_kernels.ops.self_check import difference

_MEASURED = (9, 0)


@dataclass(frozen=True)
class Choice:
    """An implementation, and what was in the way of the kernels, empty where nothing was."""

    impl: Impl
    obstacle: str = ""

    def __str__(self) -> str:
        """For people: ``torch: x is on cpu``."""
        return f"{self.impl}: {self.obstacle}" if self.obstacle else self.impl


_lock = threading.RLock()
_checked: dict[tuple[torch.device, torch.dtype], Choice] = {}


def forget_checks() -> None:
    """Let the next call on each device and dtype make its check again."""
    _checked.clear()


def resolve_impl(impl: str, x: Tensor | None = None) -> Impl:
    """Return the implementation that ``impl`` stands for on ``x``.

    ``"auto"`` is ``"triton"`` for a 16-bit tensor on a GPU of an architecture that the kernels are
    compiled for in this package's tests (sm_80, 86, 89, 90, 100, 120), if one small product, at the
    first use in a process, comes out as by the definition; else it is ``"torch"``, with a warning
    where that product differed. Speed is measured on Hopper (sm_90) only. ``"triton"`` can be asked
    for on any GPU from Ampere on. :func:`choose_impl` also says why.

    Raises:
        ValueError: ``impl`` is not a known name.
    """
    # Asked in every call: one look-up where the answer is known.
    if impl == "auto" and x is not None and x.is_cuda:
        if x.dtype not in TRITON_DTYPES:
            return "torch"
        if torch.compiler.is_compiling():
            return _impl_while_compiling(x.device, x.dtype)
        known = _checked.get((x.device, x.dtype))
        if known is not None:
            return known.impl
    if impl != "auto":
        check_choice("impl", impl, IMPLS)
        return cast(Impl, impl)
    return choose_impl(impl, x).impl


def choose_impl(impl: str, x: Tensor | None = None, *, check: bool = True) -> Choice:
    """Return the implementation that ``impl`` stands for on ``x``, and why.

    Args:
        impl: As in :func:`prodial_kernels.prodial_linear`.
        x: The input, or a tensor of its dtype and device; None for one on a CPU.
        check: Whether to make the check on first use; else it is taken as passed.

    Raises:
        ValueError: ``impl`` is not a known name.
    """
    check_choice("impl", impl, IMPLS)
    if impl != "auto":
        return Choice(cast(Impl, impl))
    if x is None:
        return Choice("torch", "the kernels need a CUDA device")
    if not x.is_cuda:
        return Choice("torch", f"x is on {x.device.type}")
    if x.dtype not in TRITON_DTYPES:
        return Choice("torch", f"x is {_name(x.dtype)}, the kernels take float16 and bfloat16")
    if not check:
        return _checked.get((x.device, x.dtype)) or _by_architecture(x.device)
    return _checked_choice(x.device, x.dtype)


def described_impl(impl: str, weight: Tensor) -> str:
    """Say what ``impl`` stands for on inputs like the weight: ``impl='auto' (torch: …)``."""
    chosen = str(choose_impl(impl, weight, check=False)).replace("x is", "the weight is")
    return f"impl={impl!r}" + (f" ({chosen})" if chosen != impl else "")


def _by_architecture(device: torch.device) -> Choice:
    capability = device_capability(device)
    if capability in COMPILED_FOR:
        return Choice("triton")
    name = torch.cuda.get_device_name(device)
    if capability < (8, 0):
        return Choice("torch", f"{name} is older than Ampere (sm_80)")
    arch = "".join(map(str, capability))
    return Choice("torch", f"the kernels are not compiled for {name} (sm_{arch}) in any test")


def _checked_choice(device: torch.device, dtype: torch.dtype) -> Choice:
    """The choice by architecture and, once per device and dtype, by one product."""
    known = _checked.get((device, dtype))
    if known is not None:
        return known
    choice = _by_architecture(device)
    if choice.impl == "triton":
        if torch.cuda.is_current_stream_capturing():
            # Of the one on which they are measured, the kernels are known to be right.
            if device_capability(device) != _MEASURED:
                choice = Choice("torch", "the kernels cannot be checked in a CUDA graph's capture")
            warnings.warn(
                f"impl='auto' takes {choice.impl!r} without having compared the kernels with the "
                "definition, because a CUDA graph is being captured; run one step before capturing",
                RuntimeWarning,
                stacklevel=2,
            )
            return choice
        with _lock:
            known = _checked.get((device, dtype))
            if known is not None:
                return known
            differs = difference(device, dtype)
        if differs is not None:
            choice = Choice("torch", f"the kernels' self-check failed ({differs})")
            warnings.warn(
                f"impl='auto' takes PyTorch instead of the Triton kernels for {_name(dtype)} on "
                f"{torch.cuda.get_device_name(device)} ({device}): their self-check failed: "
                f"{differs}. Results are right, only slower and with more memory; please report it",
                RuntimeWarning,
                stacklevel=2,
            )
    _checked[device, dtype] = choice
    return choice


def _impl_while_compiling(device: torch.device, dtype: torch.dtype) -> Impl:
    """The same, asked by torch.compile, which does not trace the check but keeps its answer."""
    return _checked_choice(device, dtype).impl


# What torch.compiler.assume_constant_result does, which would load the compiler here and now.
_impl_while_compiling._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
