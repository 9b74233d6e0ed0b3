"""Which call of a block is replayed, and which runs eagerly.

The blocks of a model are called one after the other in every step. The first calls of a shape run
eagerly and are recorded: arguments, results, whether the host waits for the device. Then all blocks
are captured, in the order in which they run; afterwards each call equal in kind to the recorded one
replays its graph.

Consecutive blocks that only pass results on share a graph, which is replayed when the last of them
is called; see :mod:`prodial_kernels.captured.deferred`. Eager, with one warning, remain:

* another shape (up to :data:`SHAPES` get graphs of their own, in the same memory), another
  structure, an input that is not what the block before returned;
* a forward before the backward of an earlier one, whose activations a replay would overwrite;
* a block that waits for the device, such as a mixture of experts.

Evaluation, generation and anything else without gradients is never replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prodial_kernels.captured.calls import Uncapturable, flatten, flatten_call, kind_of
from prodial_kernels.captured.checkpointing import (
    checkpoints_otherwise,
    checkpoints_outside,
    is_checkpointed,
)
from prodial_kernels.captured.deferred import with_content
from prodial_kernels.captured.engine import Engine
from prodial_kernels.captured.program import Given, Pass, Program, Record, Taken, name_of
from prodial_kernels.captured.replay import Pending
from prodial_kernels.captured.running import between, call_eagerly, defer, difference, replay
from prodial_kernels.captured.state import BlockState
from prodial_kernels.models.mixers.inserted.tokens import reads_from_outside

WARM_UP = 2
"""Eager steps of a shape before it is captured: one compiles, in one host waits are recorded."""

SHAPES = 4
"""Shapes that are captured; further ones stay eager."""

CHANGES = 3
"""How often a changed model is captured anew."""

Function = Callable[..., Any]


class CaptureError(RuntimeError):
    """Blocks cannot be captured in CUDA graphs."""


class CaptureWarning(UserWarning):
    """Some call of a captured block runs eagerly."""


class Chain:
    """The blocks of a model and their graphs."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        engine: Engine,
        *,
        batch_size: int | None = None,
        seq_len: int | None = None,
        together: bool = True,
        say: Callable[[str], None],
    ) -> None:
        """Prepare; nothing is captured yet.

        Args:
            blocks: In the order in which they run.
            engine: Captures and replays.
            batch_size: The only one to capture; None for any.
            seq_len: Likewise.
            together: Whether consecutive blocks may share a graph.
            say: Called once with each reason for an eager call.
        """
        self.blocks = list(blocks)
        self.engine = engine
        self.programs: dict[Hashable, Program] = {}
        self._wanted = (batch_size, seq_len)
        self._say = say
        self._said: set[str] = set()
        self._states: list[BlockState] = []
        self._pending = Pending()
        self._replaying: Pass | None = None
        self._recording: Pass | None = None
        self._stale: str | None = None
        self._together = together
        self._separating = False
        self._changes = 0
        self._outside = any(map(checkpoints_outside, self.blocks))

    def call(self, index: int, upstream: Function, args: Any, kwargs: Any) -> Any:
        """Return ``upstream(*args, **kwargs)`` of block ``index``, by replay where possible.

        Raises:
            CaptureError: Capturing failed, or the call is on another device.
        """
        block = self.blocks[index]
        if index == 0:
            self._replaying = self._recording = None
        if torch.compiler.is_compiling():
            return upstream(*args, **kwargs)
        if not (block.training and torch.is_grad_enabled()) or self.engine.busy():
            return _plain(upstream, args, kwargs)
        obstacle = _watched_by_others()
        if self._outside and is_checkpointed(block):
            obstacle = "this transformers checkpoints around a block's forward (5.24 does not)"
        if obstacle is not None:
            self._once("others", f"{obstacle}: blocks are launched as before meanwhile")
            return _plain(upstream, args, kwargs)
        try:
            structure, leaves = flatten_call(args, kwargs)
        except Uncapturable as reason:
            self._once("argument", f"{self._name(index)} is launched as before: {reason}")
            return _plain(upstream, args, kwargs)
        kinds = tuple(map(kind_of, leaves))
        if kinds and kinds[0].device != self.engine.device:
            raise CaptureError(
                f"{self._name(index)} is given a tensor on {kinds[0].device}, but is captured on "
                f"{self.engine.device}: nn.DataParallel, which transformers' Trainer uses where it "
                "sees several GPUs, is not captured. Set CUDA_VISIBLE_DEVICES to one"
            )
        key = (structure, kinds, _autocast(self.engine.device), is_checkpointed(block))
        if index == 0:
            self._begin(key, leaves)
        if self._recording is not None:
            record = Record(key)
            return self._record(
                self._recording, index, record, leaves, lambda: upstream(*args, **kwargs)
            )
        run = self._replaying
        if run is None or index not in run.program.positions:
            return _plain(upstream, args, kwargs)
        last = index == run.program.members[run.program.positions[index]][-1]
        obstacle = difference(run, index, key, leaves) or self._change(index)
        seen = between(self.blocks, run, index, last) if obstacle is None else None
        if obstacle is not None or seen is not None:
            # The graphs after this one read what its replay would have written.
            self._replaying = None
            if run.deferral is not None:
                run.deferral.read = None
            if seen is not None:
                self._separate(f"{self._name(index)} {seen}")
            else:
                self._once("difference", f"{self._name(index)} is launched as before: {obstacle}")
            return _plain(upstream, args, kwargs)
        run.cursor += 1
        if last:
            return replay(run, index, leaves, self._pending)
        return defer(run, index, partial(call_eagerly, upstream, structure), leaves, self._read)

    def forget(self) -> None:
        """Drop every graph and every record."""
        self.programs.clear()
        self._states.clear()
        self._replaying = self._recording = None
        self.engine.release()

    # --- The first block of a forward. --------------------------------------------------------

    def _begin(self, key: Hashable, leaves: list[Tensor]) -> None:
        """Decide whether this forward through the blocks is replayed, recorded or plain."""
        if self._pending:
            self._once(
                "pending",
                "a forward begins while an earlier one still waits for its backward: it is "
                "launched as before",
            )
            return
        if self._stale is not None:
            self._changed(self._stale)
        if self._separating:
            self._separating = self._together = False
            self.forget()
        program = self.programs.get(key)
        if program is None:
            program = self._new_program(key, leaves)
        if program is None or program.plain:
            return
        if program.finished:
            program.finished = False
            program.warm += 1
        if not program.graphs and program.warm >= WARM_UP:
            self._capture(program)
        if program.graphs:
            self._replaying = Pass(program)
        elif not program.plain:
            program.records = {}
            self._recording = Pass(program)

    def _new_program(self, key: Hashable, leaves: list[Tensor]) -> Program | None:
        if self._changes > CHANGES:
            return None
        shape = next((leaf.shape for leaf in leaves if leaf.ndim >= 2), torch.Size())
        batch = f"a batch of {list(shape[:2])} is launched as before"
        sizes = zip(("batch_size", "seq_len"), self._wanted, shape, strict=False)
        for name, wanted, found in sizes:
            if wanted is not None and wanted != found:
                self._once("shape", f"{batch}: capture() was asked for {name}={wanted}")
                return None
        if len(self.programs) >= SHAPES:
            self._once(
                "shapes",
                f"{batch}: {SHAPES} kinds of batches are captured already. Fill batches up to one "
                "length, or give batch_size and seq_len",
            )
            return None
        return self.programs.setdefault(key, Program())

    def _separate(self, reason: str) -> None:
        """Capture each block on its own from the next forward on."""
        self._separating = True
        self._once("together", f"{reason}: from now on each block is captured on its own")

    def _changed(self, reason: str) -> None:
        """Forget all graphs of the model as it was, up to :data:`CHANGES` times."""
        self._stale = None
        self._changes += 1
        self.forget()
        if self._changes > CHANGES:
            message = f"blocks have changed {self._changes} times ({reason}): launched as before"
        else:
            message = f"blocks have changed since they were captured ({reason}): captured again"
        self._once(f"changed {self._changes > CHANGES}", message)

    # --- Eager calls that are recorded. ------------------------------------------------------

    def _record(
        self, run: Pass, index: int, record: Record, leaves: list[Tensor], call: Callable[[], Any]
    ) -> Any:
        program = run.program
        record.leaves = [Taken(kind_of(x), x.stride(), run.origin_of(x)) for x in leaves]
        if index in program.records:
            record.obstacle = "it runs more than once in a forward"
        if checkpoints_otherwise(self.blocks[index]):
            record.obstacle = "it checkpoints by a function of its own"
        if reads_from_outside(self.blocks[index]):
            record.obstacle = "it reads affix-tuning's network, which is trained outside of it"
        elsewhere = [str(leaf.device) for leaf in leaves if leaf.device != self.engine.device]
        if elsewhere:
            record.obstacle = f"it is given a tensor on {elsewhere[0]}"
        before, bytes_before = self.engine.drawn(), self.engine.allocated()
        if program.warm == WARM_UP - 1:
            result, waits = self.engine.watched(call)
            if waits:
                record.obstacle = f"it waits for the device in {waits[0]}"
        else:
            result = call()
        record.drawn = before, self.engine.drawn()
        record.memory = bytes_before, self.engine.allocated()
        results: list[Tensor] = []
        try:
            record.result = flatten(result, results)
        except Uncapturable as reason:
            record.obstacle = str(reason)
        record.results = [Given(kind_of(result), result.stride()) for result in results]
        for number, tensor in enumerate(results):
            run.note_origin(tensor, (index, number))
            if tensor.requires_grad:
                tensor.register_hook(_Finished(program))
        program.records[index] = record
        return result

    # --- Capturing and replaying. -------------------------------------------------------------

    def _capture(self, program: Program) -> None:
        if not self._states:
            self._states = [BlockState(block) for block in self.blocks]
        change = next(filter(None, (state.change() for state in self._states)), None)
        if change is not None:
            # Other shapes were captured before it.
            self._changed(change)
            program.plain = True
            return
        sections = program.plan(
            self.blocks, self._states, self.engine.device, together=self._together
        )
        refused: dict[str, list[int]] = {}
        for index, record in program.records.items():
            if record.obstacle is not None:
                refused.setdefault(record.obstacle, []).append(index)
        for obstacle, indices in refused.items():
            name = self._name(indices[0])
            if len(indices) > 1:
                name += f" and {len(indices) - 1} more"
            self._once(obstacle, f"{name} is launched as before: {obstacle}")
        if not sections:
            program.plain = True
            return
        try:
            program.graphs = self.engine.capture(sections, program.held())
        except torch.OutOfMemoryError:
            self.forget()
            raise
        except RuntimeError as error:
            self.forget()
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CaptureError(
                f"the blocks cannot be captured in CUDA graphs: {first}. Train without "
                "prodial_kernels.capture"
            ) from error
        program.sections = sections

    def _change(self, index: int) -> str | None:
        change = self._states[index].change()
        if change is not None:
            self._stale = change
        return change

    def _read(self) -> None:
        self._replaying = None
        self._separate("what a block returns is read before the next one")

    def _name(self, index: int) -> str:
        return name_of(index, self.blocks[index])

    def _once(self, about: str, message: str) -> None:
        if about not in self._said:
            self._said.add(about)
            self._say(message)


def _plain(upstream: Function, args: Any, kwargs: Any) -> Any:
    return upstream(*with_content(tuple(args)), **with_content(kwargs))


class _Finished:
    """A tensor hook that notes in a program that its backward has run."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def __call__(self, gradient: Tensor) -> None:
        self._program.finished = True


def _autocast(device: torch.device) -> tuple[bool, torch.dtype]:
    kind = device.type
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def _watched_by_others() -> str | None:
    """Say which observer of operations is active here that a graph would bypass, if any."""
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode is active"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "hooks of saved tensors are active (checkpointing or offloading of activations)"
    return None
