"""The processes of a run, and what they tell each other.

Everything but gradients, such as which state to resume from, goes between CPUs as JSON: nothing is
unpickled, a wait has no time limit, and it ends when a process dies. A process that fails leaves
its message in the store by which the processes have found each other.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from prodial_kernels.training.distributed.launch import Launch, LaunchError
from prodial_kernels.training.distributed.life import Life, Watch, is_alive, own_life

_FAILED = "failed"
_SECONDS_BETWEEN_CHECKS = 0.5
_SECONDS_FOR_A_MESSAGE = 2.0
_SECONDS_TO_BE_HEARD = 2.0
_WHILE_THE_FIRST_IS_BUSY = timedelta(days=100)
_joined = itertools.count()


class PeerError(RuntimeError):
    """Another process of the run has failed, and this one cannot go on without it."""


class World:
    """This process among those of its run.

    Attributes:
        rank: Its number, from 0.
        size: How many there are.
    """

    def __init__(self, launch: Launch | None = None, store: Any = None, group: Any = None) -> None:
        """Make one process by itself, or one that knows the others by a store and a group."""
        launch = Launch() if launch is None else launch
        self.rank, self.size = launch.rank, launch.size
        self._store = store
        self._group = group
        self._neighbours: dict[int, Life] = {}
        self._watch: Watch | None = None
        self._abort: Callable[[], object] | None = None
        self._aborting = threading.Lock()

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks for all."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return the JSON values of all processes, by number; every process must call it.

        Raises:
            PeerError: Another process has failed.
        """
        if self.size == 1:
            return [value]
        own = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self._all_gather(torch.tensor([len(own)]))
        padded = torch.zeros(int(max(map(int, sizes))), dtype=torch.uint8)
        padded[: len(own)] = own
        texts = self._all_gather(padded)
        return [
            json.loads(bytes(text[: int(size)].tolist()))
            for text, size in zip(texts, sizes, strict=True)
        ]

    def from_main(self, function: Callable[[], Any]) -> Any:
        """Return in every process what ``function`` returns in the first, a JSON value.

        The others wait, however long it takes. Raises as :meth:`gather`.
        """
        return self.gather(function() if self.main else None)[0]

    def wait(self) -> None:
        """Wait until every process is here; raises as :meth:`gather`."""
        self.gather(None)

    def check_same(self, what: str, value: Any) -> None:
        """Raise LaunchError, in every process, unless a JSON value is the same in all."""
        values = self.gather(value)
        other = next((rank for rank, theirs in enumerate(values) if theirs != values[0]), None)
        if other is not None:
            raise LaunchError(
                f"processes 0 and {other} of {self.size} have different {what}: all must be "
                "started with the same options, versions and files"
            )

    def wait_for(self, work: Any) -> None:
        """Wait for work of a process group between CPUs, and look after the others meanwhile.

        Raises:
            PeerError: Another process has failed.
        """
        try:
            self.poll(work.is_completed)
            work.wait()
        except PeerError:
            raise
        except RuntimeError as error:
            raise self._lost(error) from error

    def poll(self, done: Callable[[], bool]) -> None:
        """Wait until ``done()`` for what needs all processes; PeerError if another one failed."""
        began = looked = time.monotonic()
        while not done():
            now = time.monotonic()
            # A step of a small model is over in milliseconds: sleeping would be half of it.
            if now - began > 0.05:
                time.sleep(0.001)
            if now - looked > _SECONDS_BETWEEN_CHECKS:
                looked = now
                failure = self._failure() or self._missing()
                if failure is not None:
                    self.break_off()
                    raise failure
        if self._watch is not None and self._watch.gone is not None:
            # It came to its end without the others' part.
            raise self._lost(self._is_gone(self._watch.gone))

    def meet(self) -> None:
        """Learn which others run on this machine; raises as :meth:`gather`.

        A GPU that waits for a process that is gone waits on: nothing tells it.
        """
        found = self.gather(own_life())
        lives = {rank: Life(*one) for rank, one in enumerate(found) if one is not None}
        self._neighbours = {
            rank: life for rank, life in lives.items() if rank != self.rank and is_alive(life)
        }
        # None has ended before all have looked: what is not seen now is elsewhere.
        self.wait()

    def guard(self, abort: Callable[[], object]) -> None:
        """From now on, call ``abort`` once a process of this machine has ended, or another failed.

        It ends what a GPU waits for the others in. Until then whatever waits for the GPU would wait
        for ever: :meth:`poll` does not, but a copy, freed memory or the end of a graph does.
        """
        self._abort = abort
        self._watch = Watch(self._neighbours, self.break_off)

    def unguard(self) -> None:
        """Let the others end from here on; they owe this process nothing more."""
        if self._watch is not None:
            self._watch.stop()

    def break_off(self) -> None:
        """End what is under way between GPUs, if anything; the first call does it."""
        with self._aborting:
            abort, self._abort = self._abort, None
            if abort is not None:
                # Of what is broken already nothing is expected.
                with suppress(Exception):
                    abort()

    def _missing(self) -> PeerError | None:
        """A process of this machine that has ended; what it has left to say goes first."""
        for rank, life in self._neighbours.items():
            if not is_alive(life):
                return self._lost(self._is_gone(rank))
        return None

    def _is_gone(self, rank: int) -> ProcessLookupError:
        return ProcessLookupError(f"process {rank} of {self.size} is gone")

    def report(self, error: BaseException) -> PeerError | None:
        """Leave an error for the others; return another one that a process has left before it."""
        if self.size == 1 or isinstance(error, PeerError):
            return None
        message = f"{type(error).__name__}: {error}".removesuffix(": ")
        try:
            found = self._store.compare_set(_FAILED, "", json.dumps([self.rank, message]))
            rank, first = json.loads(found)
            if rank == self.rank:
                self._be_heard()
        except (RuntimeError, OSError):
            return None
        return None if first == message else self._failure()

    def _all_gather(self, own: Tensor) -> list[Tensor]:
        found = [torch.empty_like(own) for _ in range(self.size)]
        try:
            work = distributed.all_gather(found, own, group=self._group, async_op=True)
        except RuntimeError as error:
            raise self._lost(error) from error
        self.wait_for(work)
        return found

    def _failure(self) -> PeerError | None:
        """What another process has left; None also where its store has gone with it."""
        try:
            if not self._store.check([_FAILED]):
                return None
            rank, message = json.loads(self._store.get(_FAILED))
            self._store.set(f"heard/{self.rank}", "")
        except (RuntimeError, OSError):
            return None
        return PeerError(f"process {rank} of {self.size} failed: {message}")

    def _lost(self, error: BaseException) -> PeerError:
        """Say why an exchange broke off: by the message that a process has left, if it has."""
        deadline = time.monotonic() + _SECONDS_FOR_A_MESSAGE
        while time.monotonic() < deadline:
            told = self._failure()
            if told is not None:
                return told
            time.sleep(0.1)
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return PeerError(f"another process of the run has ended without a word ({why})")

    def _be_heard(self) -> None:
        """Stay while others read the message, where they read it from this process."""
        if not self.main or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        deadline = time.monotonic() + _SECONDS_TO_BE_HEARD
        keys = [f"heard/{rank}" for rank in range(1, self.size)]
        while time.monotonic() < deadline and not self._store.check(keys):
            time.sleep(0.02)


ONE_PROCESS = World()
"""A process by itself: it gathers what it has, and waits for nobody."""


@contextmanager
def joined(launch: Launch, device: torch.device) -> Iterator[World]:
    """Join the processes of a run until the block ends.

    A CUDA device means the one that ``launch`` gives this process, which becomes the current one.
    A process group that exists already is used, and left as it is. An error in the block is left
    for the other processes; where another process was first, its error takes the place of ours.

    Raises:
        LaunchError: There are more processes on this machine than GPUs, or the process group that
            exists is of other processes.
        PeerError: Another process failed.
    """
    if launch.size == 1:
        yield ONE_PROCESS
        return
    if not distributed.is_available():
        raise LaunchError("this PyTorch is built without torch.distributed; run one process")
    take_gpu(launch, device)
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", launch.rank, launch.size))
    store = PrefixStore(f"prodial_kernels/{next(_joined)}", store)
    own = not distributed.is_initialized()
    if own:
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("tensors", store),
            rank=launch.rank,
            world_size=launch.size,
            device_id=torch.device("cuda", launch.local_rank) if device.type == "cuda" else None,
        )
    elif (distributed.get_rank(), distributed.get_world_size()) != (launch.rank, launch.size):
        raise LaunchError(
            f"torch.distributed is initialised as process {distributed.get_rank()} of "
            f"{distributed.get_world_size()}, and the environment says {launch.rank} of "
            f"{launch.size}; start all processes with torchrun"
        )
    group = distributed.new_group(backend="gloo", timeout=_WHILE_THE_FIRST_IS_BUSY)
    world = World(launch, PrefixStore("told", store), group)
    try:
        world.meet()
        if own and device.type == "cuda":
            world.guard(_abort_everybody)
        yield world
        world.unguard()
        world.wait()
    except BaseException as error:
        world.unguard()
        first = world.report(error)
        if own and device.type == "cuda":
            # Others may never answer what is under way.
            world.break_off()
        elif own:
            distributed.destroy_process_group()
        if first is not None and isinstance(error, Exception):
            raise first from error
        raise
    if own:
        distributed.destroy_process_group()


def _abort_everybody() -> None:
    everybody = distributed.group.WORLD
    if everybody is not None:
        everybody.abort()


def take_gpu(launch: Launch, device: torch.device) -> None:
    """Make the GPU that ``launch`` gives this process the current one, before any is used.

    Nothing to do for a process by itself, or on a CPU.

    Raises:
        LaunchError: There are more processes on this machine than GPUs.
    """
    if launch.size == 1 or device.type != "cuda":
        return
    here = torch.cuda.device_count()
    if launch.local_rank >= here:
        raise LaunchError(
            f"process {launch.rank} is number {launch.local_rank} on this machine, which has "
            f"{here} {'GPU' if here == 1 else 'GPUs'}: start one process for each GPU "
            "(torchrun --nproc-per-node), or use device 'cpu'"
        )
    torch.cuda.set_device(launch.local_rank)
