"""Ctrl-C, SIGTERM and the like: a step is finished and saved, everything else stops at once.

The like are SIGHUP (the terminal has gone), SIGXCPU (the time limit is near) and SIGUSR1 (so batch
systems warn of theirs): as far as the system has them and nothing else handles or ignores them, as
``nohup`` makes a process ignore SIGHUP.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop.

    A ``KeyboardInterrupt``, so that ``except Exception`` does not hold it up.

    Attributes:
        signum: The signal's number.
    """

    def __init__(self, signum: int) -> None:
        """Remember the signal."""
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """What a shell reports for this signal: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.signum


_ALWAYS = ("SIGINT", "SIGTERM")
_UNLESS_TAKEN = ("SIGHUP", "SIGXCPU", "SIGUSR1")


class StopSignals:
    """Turn signals that ask to stop into :class:`Interrupted` while the context is open.

    Inside :meth:`deferred` a first signal is only noted in ``received``. A second SIGINT or SIGTERM
    raises all the same; the others say nothing new when they come again, as SIGXCPU does every
    second. In a thread other than the main one signals cannot be handled and are left alone.

    Where several processes train together, ``received`` is what they have agreed on
    (:meth:`agree`), and ``noted`` what this one was sent: all must stop after the same step.
    """

    def __init__(self, *, shared: bool = False) -> None:
        """Start with no signal received and nothing installed."""
        self.received: int | None = None
        self.noted: int | None = None
        self._shared = shared
        self._raised = False
        self._deferred = False
        self._urgent = {getattr(signal, name) for name in _ALWAYS}
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for name in (*_ALWAYS, *_UNLESS_TAKEN):
                # Windows has but two of them.
                signum = getattr(signal, name, None)
                if signum is None:
                    continue
                if name in _ALWAYS or signal.getsignal(signum) is signal.SIG_DFL:
                    self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Put the former handlers back."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold a first signal back until the block is done; then :meth:`check` raises it."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    def agree(self) -> None:
        """Let the signal that this process or another one of the run was sent be received."""
        self.received = signal.SIGTERM if self.noted is None else self.noted

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal was held back."""
        if self.received is not None:
            self._raised = True
            raise Interrupted(self.received)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        again = self._raised or self.noted is not None
        if again and signum not in self._urgent:
            return
        if self._deferred and (self.noted is None or self.noted not in self._urgent):
            self.noted = signum
            if not self._shared:
                self.received = signum
            return
        self._raised = True
        raise Interrupted(signum)
