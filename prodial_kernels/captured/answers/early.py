"""Whether a loss is finite, known to the host while backward still runs.

transformers' ``Trainer`` asks ``isnan(loss)`` behind every backward (``logging_nan_inf_filter``, on
by default). The answer is computed behind everything that was launched, so the device has nothing
to do while the host clips, steps and makes the next batch. The loss itself is there since the end
of forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_QUESTIONS = frozenset((torch.isnan, torch.isinf, Tensor.isnan, Tensor.isinf))
# What Trainer and accelerate do to a loss, besides differentiating it.
_KEPT = frozenset((Tensor.detach, Tensor.mul, Tensor.mul_, Tensor.div, Tensor.div_))


class _Copy(NamedTuple):
    """A loss on its way to the host.

    Attributes:
        tensor: On the host; there once ``ready`` has come.
        ready: None where it is there already.
        version: The loss's when this was copied, or when the last of ``later`` had run.
        later: What was done to the loss since: functions, and the numbers they took.
    """

    tensor: Tensor
    ready: torch.cuda.Event | None
    version: int
    later: tuple[tuple[Callable[..., Tensor], tuple[Any, ...]], ...] = ()

    def value(self) -> Tensor:
        """Wait for it, and repeat on the host what was done to the loss."""
        if self.ready is not None:
            self.ready.synchronize()
        value = self.tensor
        for function, numbers in self.later:
            value = function(value.clone(), *numbers)
        return value


class EarlyLoss(Tensor):
    """A loss with a copy of itself on its way to the host.

    The copy answers ``isnan`` and ``isinf``, as tensors on the host, so that they wait for what
    was launched before the loss only. Detached, multiplied or divided by a number, in place or not,
    it stays one; whatever else takes it takes a plain tensor and gives one.
    """

    _copy: _Copy

    @staticmethod
    def of(loss: Tensor) -> EarlyLoss:
        """Return ``loss``, a tensor of one number, differentiable as before."""
        # Into pinned memory, or the copy would wait.
        copy = torch.empty_like(loss, device="cpu", pin_memory=loss.is_cuda, requires_grad=False)
        copy.copy_(loss.detach(), non_blocking=True)
        ready = torch.cuda.Event() if loss.is_cuda else None
        if ready is not None:
            ready.record(torch.cuda.current_stream(loss.device))
        return _with(loss, _Copy(copy, ready, loss._version))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Answer questions by the copy; anything else is done to the loss."""
        with torch._C.DisableTorchFunctionSubclass():
            loss = args[0] if args and not kwargs else None
            if type(loss) is not EarlyLoss or loss._copy.version != loss._version:
                return func(*args, **(kwargs or {}))
            if func in _QUESTIONS and len(args) == 1:
                return func(loss._copy.value())
            numbers = tuple(args[1:])
            result = func(*args)
            if func not in _KEPT or any(type(number) not in (int, float) for number in numbers):
                return result
            later = loss._copy.later if func is Tensor.detach else (
                *loss._copy.later, (func, numbers)
            )  # fmt: skip
            return _with(result, loss._copy._replace(version=result._version, later=later))


def _with(loss: Tensor, copy: _Copy) -> EarlyLoss:
    early: EarlyLoss = loss.as_subclass(EarlyLoss)
    early._copy = copy
    return early


def early_losses(model: nn.Module) -> RemovableHandle:
    """Let a model in training return its loss as an :class:`EarlyLoss`, until the hook is removed.

    What is no loss of one number beside ``loss`` in a mapping, as models of transformers return, is
    left as it is.
    """
    return model.register_forward_hook(_early)


def _early(model: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
        return
    loss = output.get("loss") if isinstance(output, dict) else None
    if type(loss) is Tensor and loss.ndim == 0 and loss.requires_grad:
        output["loss"] = EarlyLoss.of(loss)
