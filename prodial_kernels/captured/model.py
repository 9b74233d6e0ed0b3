"""``capture``: the blocks of a model launched as CUDA graphs, until they are released."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from prodial_kernels.captured.answers.walks import OwnMethod, Walks
from prodial_kernels.captured.chain import CaptureError, CaptureWarning, Chain
from prodial_kernels.captured.cuda import CudaEngine
from prodial_kernels.captured.engine import Engine
from prodial_kernels.captured.state import sharded
from prodial_kernels.models.layers.blocks import blocks_of
from prodial_kernels.models.layers.fused_norms import KERNEL_ON, FusedNorms, fuse_norms


class Captured:
    """The handle of captured blocks, until :meth:`release`; prints as a line."""

    def __init__(self, chain: Chain, norms: FusedNorms, walks: Walks) -> None:
        """Take over the blocks; made by :func:`capture`."""
        self._chain = chain
        self._norms = norms
        self._walks = walks
        self._forwards = [
            BlockForward(block, chain, index) for index, block in enumerate(chain.blocks)
        ]

    def __enter__(self) -> Captured:
        """Leave the blocks captured for a block of code."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release them."""
        self.release()

    def __str__(self) -> str:
        captured = [program for program in self._chain.programs.values() if program.graphs]
        n_blocks = len(self._chain.blocks)
        if not captured:
            return f"captured blocks: none of {n_blocks} yet; the first steps run as they are"
        first = [(program.records[0].leaves[0].kind, len(program.order)) for program in captured]
        shapes = ", ".join(f"{list(kind.shape[:2])}: {n} of {n_blocks}" for kind, n in first)
        return f"captured blocks: {shapes}"

    def release(self) -> None:
        """Restore every block's own forward and free the graphs; a second call does nothing."""
        for forward in self._forwards:
            forward.remove()
        self._forwards = []
        self._norms.remove()
        self._walks.remove()
        self._chain.forget()


class BlockForward:
    """A block's ``forward`` while it is captured.

    An instance attribute rather than a method of the class: hooks of the block run around it, and
    transformers' checkpointing inside. Copies and pickles of the model hold the own forward.
    """

    def __init__(self, block: nn.Module, chain: Chain, index: int) -> None:
        """Take a block over."""
        self._block = weakref.ref(block)
        self._chain = chain
        self._index = index
        self._before = vars(block).get("forward")
        self.__wrapped__ = self.upstream
        block.forward = self

    def upstream(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own forward."""
        if self._before is not None:
            return self._before(*args, **kwargs)
        block: Any = self._block()
        return type(block).forward(block, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward, replayed where possible."""
        return self._chain.call(self._index, self.upstream, args, kwargs)

    def __reduce__(self) -> Any:
        """Copied and pickled as the block's own forward."""
        return OwnMethod, (self._block(), "forward")

    def remove(self) -> None:
        """Restore the block's own forward."""
        block = self._block()
        if block is None or vars(block).get("forward") is not self:
            return
        if self._before is None:
            del block.forward
        else:
            block.forward = self._before


def capture(
    model: nn.Module,
    *,
    batch_size: int | None = None,
    seq_len: int | None = None,
    norms: bool = True,
) -> Captured:
    """Launch forward and backward of every block of a model as CUDA graphs, in any training loop.

    The host then launches a few graphs instead of some hundred kernels a block, and those launches
    are what bounds a step of a small model. Consecutive blocks share one graph if each takes only
    what the one before returned and nothing reads or hooks what passes between them. Call it before
    training, with adapters in place. The first two steps of a shape run eagerly, then its blocks
    are captured, all in one memory pool.
    Gradients accumulate in ``.grad`` as in eager training: clipping, ``GradScaler``, any optimiser
    and ``zero_grad`` work. Dropout draws the same numbers as eagerly; autocast and transformers'
    gradient checkpointing are captured as they are set; evaluation, generation, state dicts and
    saving do not change. Meanwhile the model answers ``parameters()``, ``train()`` and
    ``num_parameters()`` from memory, where a trainer asks them in every step.

    With ``DistributedDataParallel`` each process captures by itself, before or after the model is
    wrapped. Gradients are reduced outside of the graphs, all at once behind the last backward.

    A call that differs from the captured ones runs eagerly, and a :class:`CaptureWarning` says so
    once: another shape, a cache in training, a block that waits for the device. A model that
    changes (adapters merged, switched off or exchanged, weights frozen) is captured anew.

    Args:
        model: Any module with a list of blocks, on a CUDA device: transformers', mamba_ssm's,
            adapted by this package, by PEFT or not at all; in ``DistributedDataParallel`` or not.
        batch_size: Capture batches of this size only; default: of every shape, up to four.
        seq_len: Likewise the length.
        norms: Also run each RMS norm of transformers as one kernel, as fine-tuning here does; it
            rounds once instead of thrice.

    Returns:
        A handle; leaving its ``with`` block or calling ``release()`` restores the model.

    Raises:
        CaptureError: The model is not on one CUDA device, is sharded or in ``DataParallel``, or its
            blocks are not found, captured already or under accelerate's hooks. Later, from the step
            that captures: the blocks cannot be captured.
    """
    device = _device_of(model)
    if device.type != "cuda":
        raise CaptureError(
            f"model: expected one on a CUDA device, got one on {device.type!r}; move it there "
            "before capture(), or train without"
        )
    return capture_with(
        model, CudaEngine(device), batch_size=batch_size, seq_len=seq_len, norms=norms
    )


def capture_with(
    model: nn.Module,
    engine: Engine,
    *,
    batch_size: int | None = None,
    seq_len: int | None = None,
    norms: bool = True,
    together: bool = True,
) -> Captured:
    """:func:`capture` by the caller's engine; ``together=False`` gives each block its own graph."""
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if value is not None and value < 1:
            raise CaptureError(f"{name} must be at least 1, got {value}")
    blocks = _blocks(model)
    fused = fuse_norms(model) if norms and engine.device.type in KERNEL_ON else FusedNorms()
    chain = Chain(
        blocks, engine, batch_size=batch_size, seq_len=seq_len, together=together,
        say=partial(_warn, CaptureWarning),
    )  # fmt: skip
    return Captured(chain, fused, Walks(model))


def _blocks(model: nn.Module) -> Sequence[nn.Module]:
    """Return the blocks to capture, each once, in order; CaptureError where there are none."""
    if isinstance(model, nn.DataParallel):
        raise CaptureError(
            "model is wrapped in DataParallel, which is not captured; run one process for each GPU "
            "(torchrun) and wrap it in DistributedDataParallel"
        )
    if sharded(model):
        raise CaptureError(
            "model: its parameters are sharded (FSDP, ZeRO) or on 'meta', which is not captured; "
            "DistributedDataParallel is"
        )
    try:
        blocks = blocks_of(model)
    except ValueError:
        raise CaptureError(
            f"{type(model).__name__} holds no nn.ModuleList of blocks to capture"
        ) from None
    for block in blocks:
        if isinstance(vars(block).get("forward"), BlockForward):
            raise CaptureError("the model's blocks are captured already; release() them first")
        if any(hasattr(module, "_hf_hook") for module in block.modules()):
            raise CaptureError(
                "accelerate moves the model's blocks between devices (device_map), which no graph "
                "can hold; load the model onto one device"
            )
    return list(dict.fromkeys(blocks))


def _device_of(model: nn.Module) -> torch.device:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise CaptureError(f"model: expected one on a single CUDA device, got one on {names}")
    return next(iter(devices), torch.device("cpu"))


def _warn(category: type[Warning], message: str) -> None:
    warnings.warn(message, category, stacklevel=2)
