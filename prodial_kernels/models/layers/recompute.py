"""Give the blocks of a model their levels of the memory plan, and take them back.

* ``"norm"``: a block's norm keeps its input, and what follows keeps none of its output: it is
  computed again where backward asks for it.
* ``"recompute"``: that, and Mamba-1's block computes ``in_proj``'s output again
  (``mixer.prodial_recompute_xz``).
* ``"checkpoint"``: a block keeps its input and runs again in backward. Where a block reads its
  input only rounded to the dtype of its norm, the rounded input is what is kept, and what it runs
  on again: the same gradient.
* ``"offload"``: the same, with that input in the host's memory meanwhile
  (:mod:`~prodial_kernels.models.layers.host_memory`).

Everything takes part in training mode with gradients only, and gives the same gradients bit for
bit where the kernels do. What runs again keeps ``out_proj``'s output for its scale's gradient,
which else costs that product a third time; in Mamba-1's fused block the gradients of that scale and
of B are then of the output as it was given, else of one whose input is rounded once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from prodial_kernels.models.layers.blocks import (
    Calling,
    SetAttribute,
    blocks_of,
    has_separate_norm,
    mixer_of,
    plain_forward,
)
from prodial_kernels.models.layers.fused_norms import KERNEL_ON, FusedNorms, fuse_norms, is_fused
from prodial_kernels.models.layers.host_memory import HostStore, Sent
from prodial_kernels.models.mixers.arguments import cache_among, named_arguments, split_first
from prodial_kernels.models.mixers.mamba1_block import KEEP_OUTPUT, RECOMPUTE_XZ
from prodial_kernels.models.patch_point import AdaptedMixer, Changes, Undo, View

KEEP, NORM, RECOMPUTE = "keep", "norm", "recompute"
CHECKPOINT, OFFLOAD = "checkpoint", "offload"
LEVELS = (KEEP, NORM, RECOMPUTE, CHECKPOINT, OFFLOAD)
"""From the fastest to the smallest."""

# Attribute of a block: where its input waits.
_STORE = "prodial_host_store"

LEVEL_TEXTS = {
    KEEP: "keep what the fused operations need",
    NORM: "compute the norm before in_proj again",
    RECOMPUTE: "compute the norm and in_proj's output again",
    CHECKPOINT: "keep one residual, compute the block again",
    OFFLOAD: "keep one residual in the host's memory, compute the block again",
}


class AppliedLevels(Changes):
    """Levels that a model's blocks have, until :meth:`remove`."""

    def __enter__(self) -> AppliedLevels:
        """Leave the levels on for a block of code."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take them off."""
        self.remove()


def prepare_blocks(
    model: nn.Module,
    levels: Sequence[str] | None,
    *,
    device: torch.device,
    say: Callable[[str], None] = lambda message: None,
) -> AppliedLevels:
    """Fuse a model's norms where there is a kernel for them, then give its blocks their levels.

    Call it after ``apply_prodial``, and take it back before adapters are removed or merged; that
    gives the norms back as well.

    Args:
        model: A model of transformers or mamba_ssm.
        levels: One for each block, as :func:`apply_levels` takes them; None to keep everything, in
            a model without a list of blocks too.
        device: Where the model runs.
        say: Told which norms were fused, if any.
    """
    norms = fuse_norms(model) if device.type in KERNEL_ON else FusedNorms()
    if len(norms):
        say(str(norms))
    # Removed in reverse: a block gets back the class that it had before.
    return AppliedLevels([norms] if levels is None else [norms, apply_levels(model, levels)])


def apply_levels(model: nn.Module, levels: Sequence[str]) -> AppliedLevels:
    """Let each block of a model keep what its level says.

    Call it after ``apply_prodial``, and take the levels off before adapters are removed or merged.

    Args:
        model: A model of transformers or mamba_ssm with a list of blocks.
        levels: One for each block, as :class:`~prodial_kernels.training.memory.plan.MemoryPlan`
            has them.

    Raises:
        ValueError: Another number of levels than blocks, an unknown level, or one that a block
            does not have.
    """
    blocks = blocks_of(model)
    if len(levels) != len(blocks):
        raise ValueError(f"the model has {len(blocks)} blocks, got {len(levels)} levels")
    applied = AppliedLevels([])
    store = HostStore()
    try:
        for index, (block, level) in enumerate(zip(blocks, levels, strict=True)):
            if level not in LEVELS:
                raise ValueError(f"level of block {index}: expected one of {LEVELS}, got {level!r}")
            applied._changes += _changes(block, level, index, store)
    except BaseException:
        applied.remove()
        raise
    return applied


def checkpointed_forward(block: nn.Module, upstream: Callable[..., Any], *args: Any,
                         **kwargs: Any) -> Any:  # fmt: skip
    """``block(*args, **kwargs)``, computed again in backward; first argument: hidden states.

    Raises:
        ValueError: A cache is passed, under any name.
    """
    if not (block.training and torch.is_grad_enabled()):
        return upstream(block, *args, **kwargs)
    cached = cache_among(named_arguments(upstream, args, kwargs))
    if cached is not None:
        raise ValueError(
            f"{cached} in training: a block that runs again in backward would write its cache "
            "twice; call the model with use_cache=False"
        )
    first, args, kwargs = split_first(upstream, args, kwargs)
    hidden = _Input(first)
    forward, target = upstream, block  # type: Callable[..., Any], Any
    if has_separate_norm(block):
        norm = block.get_submodule("norm")
        reading = Calling(norm, partial(hidden.read_by, norm))
        forward, target = plain_forward(upstream), View(block, norm=reading)

    def run(*others: Any) -> Any:
        return forward(target, hidden.get(), *others, **kwargs)

    output = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=draws_numbers(block))
    first_output = output[0] if isinstance(output, tuple) else output
    # What gets no gradient is never asked for again.
    needed = isinstance(first_output, Tensor) and first_output.requires_grad
    hidden.shrink(vars(block).get(_STORE) if needed else None)
    return output


def recomputed_norm_forward(block: nn.Module, upstream: Callable[..., Any], *args: Any,
                       **kwargs: Any) -> Any:  # fmt: skip
    """``block(*args, **kwargs)`` without keeping what the norm gives."""
    if not (block.training and torch.is_grad_enabled()):
        return upstream(block, *args, **kwargs)
    norm, mixer = block.get_submodule("norm"), block.get_submodule("mixer")
    recomputed = _RecomputedNorm(norm, mixer)
    view = View(block, norm=Calling(norm, recomputed.norm), mixer=Calling(mixer, recomputed.mixer))
    return plain_forward(upstream)(view, *args, **kwargs)


def draws_numbers(block: nn.Module) -> bool:
    """Whether a block draws random numbers, which must be drawn alike when it runs again."""
    return any(
        getattr(module, "lora_dropout", 0) or getattr(module, "p", 0) for module in block.modules()
    )


def _changes(block: nn.Module, level: str, index: int, store: HostStore) -> list[Undo]:
    if level == KEEP:
        return []
    if level == CHECKPOINT:
        return _running_again(block)
    if level == OFFLOAD:
        if hasattr(block, "fused_add_norm"):
            raise ValueError(
                f"block {index}, a {type(block).__name__}, takes two inputs, of which the residual "
                f"would stay on the device; level {level!r} does little for it: use 'checkpoint'"
            )
        return [SetAttribute(block, _STORE, store), *_running_again(block)]
    separate, mixer = has_separate_norm(block), mixer_of(block)
    changes: list[Undo] = []
    if level == RECOMPUTE and mixer is not None:
        changes.append(SetAttribute(mixer, RECOMPUTE_XZ, True))
    if separate:
        changes.append(AdaptedMixer(block, {"forward": recomputed_norm_forward}))
    elif level == NORM or mixer is None:
        raise ValueError(
            f"block {index}, a {type(block).__name__}, has no norm of its own that could be "
            f"computed again; level {level!r} does nothing for it: use 'keep' or 'checkpoint'"
        )
    return changes


def _running_again(block: nn.Module) -> list[Undo]:
    """Let a block run again in backward, where it keeps what spares a third run of ``out_proj``."""
    mixer = mixer_of(block)
    again: Undo = AdaptedMixer(block, {"forward": checkpointed_forward})
    return [again] if mixer is None else [SetAttribute(mixer, KEEP_OUTPUT, True), again]


class _Input:
    """A block's input: itself until the forward is done, then as the block's norm has read it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._requires_grad = tensor.requires_grad
        self._read: Tensor | None = None
        self._sent: Sent | None = None
        self._first = True

    def get(self) -> Tensor:
        """The input; when the block runs again, outside the graph."""
        if self._first:
            return self._tensor
        tensor = self._tensor if self._sent is None else self._sent.store.bring(self._sent)
        return tensor.detach().requires_grad_(self._requires_grad)

    def read_by(self, norm: nn.Module, x: Tensor) -> Tensor:
        """``norm(x)``, where x is the input in the norm's dtype."""
        if self._first:
            self._read = x.detach()
        return norm(x)

    def shrink(self, store: HostStore | None) -> None:
        """Keep the smaller one for backward, in the host's memory where there is a store."""
        self._first = False
        read, self._read = self._read, None
        if read is None or read.itemsize >= self._tensor.itemsize:
            read = self._tensor.detach()
        self._tensor = read
        if store is not None:
            self._sent = store.send(read)
            # A size without memory: nothing but the store holds it now.
            self._tensor = read.new_empty(0)


class _RecomputedNorm:
    """A block's norm and mixer for one call, between which only the norm's input is kept."""

    def __init__(self, norm: nn.Module, mixer: nn.Module) -> None:
        self._norm = norm
        self._mixer = mixer
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._autocast: dict[str, Any] = {}

    def norm(self, x: Tensor) -> Tensor:
        """``norm(x)``, keeping x."""
        kind = x.device.type
        self._autocast = {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
        }
        self._input = x.detach()
        if is_fused(self._norm):
            # It keeps no more than x itself.
            self._output = self._norm(x)
        else:
            self._output = checkpoint(self._norm, x, use_reentrant=False, preserve_rng_state=False)
        return self._output

    def mixer(self, *args: Any, **kwargs: Any) -> Any:
        """``mixer(...)``, keeping nothing that shares the norm's output."""
        try:
            with saved_tensors_hooks(self._pack, self._unpack):
                return self._mixer(*args, **kwargs)
        finally:
            # The hooks hold this object until backward, and it must not hold the output.
            self._output = None

    def _pack(self, tensor: Tensor) -> Tensor | tuple[Any, ...]:
        output = self._output
        if output is None or tensor.is_meta or tensor.dtype != output.dtype:
            return tensor
        if tensor.untyped_storage().data_ptr() != output.untyped_storage().data_ptr():
            return tensor
        # How it lies in the storage of the norm's contiguous output.
        return tensor.size(), tensor.stride(), tensor.storage_offset()

    def _unpack(self, packed: Tensor | tuple[Any, ...]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad(), torch.autocast(**self._autocast):
            return self._norm(self._input).contiguous().as_strided(*packed)
