"""Ctrl-C and SIGTERM: a training step is finished and saved, everything else stops at once."""

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
        """What a shell reports for this signal: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum


class StopSignals:
    """Turn SIGINT and SIGTERM into :class:`Interrupted` while the context is open.

    Inside :meth:`deferred` a first signal is only noted in ``received``; a second one raises all
    the same. In a thread other than the main one signals cannot be handled and are left alone.
    """

    def __init__(self) -> None:
        """Start with no signal received and nothing installed."""
        self.received: int | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
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
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal was held back."""
        if self.received is not None:
            raise Interrupted(self.received)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self._deferred and self.received is None:
            self.received = signum
            return
        raise Interrupted(signum)
