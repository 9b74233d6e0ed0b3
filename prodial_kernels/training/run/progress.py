"""Progress on stderr: one bar for the training steps, a passing one for each evaluation."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from prodial_kernels.training.run.loop import StepRecord
from prodial_kernels.training.run.state import Position

_FORMAT = (
    "{desc} {n_fmt}/{total_fmt} |{bar}| {percentage:3.0f}% [{elapsed}, ETA {remaining}{postfix}]"
)
# A terminal is redrawn often; a log file gets a line's worth now and then.
_SECONDS_BETWEEN_LINES_IN_A_FILE = 15.0


class Progress:
    """Shows where a run is; shows nothing when not enabled."""

    def __init__(self, *, enabled: bool = True) -> None:
        """Show on stderr, or nothing."""
        self._enabled = enabled
        self._bar: Any = None
        self._tokens_before = 0
        self._seconds_before = 0.0

    def say(self, message: str) -> None:
        """Print a message above the bars."""
        if self._enabled:
            from tqdm import tqdm

            tqdm.write(message, file=_Stderr())

    @contextmanager
    def training(self, steps: int, position: Position) -> Iterator[None]:
        """Show a bar of training steps, beginning at ``position``."""
        self._tokens_before, self._seconds_before = position.tokens, position.seconds
        with self._open_bar("train", steps, initial=position.step, leave=True) as bar:
            self._bar = bar
            try:
                yield
            finally:
                self._bar = None

    def step(self, record: StepRecord) -> None:
        """Advance by one step; show its loss and the mean speed."""
        if self._bar is None:
            return
        tokens = record.position.tokens - self._tokens_before
        seconds = record.position.seconds - self._seconds_before
        self._bar.set_postfix_str(
            f"loss {record.loss:.3f}, {tokens / max(seconds, 1e-9):,.0f} tokens/s", refresh=False
        )
        self._bar.update(1)

    @contextmanager
    def evaluating(
        self, title: str = "evaluate", *, leave: bool = False
    ) -> Iterator[Callable[[int, int], None]]:
        """Show a bar, which disappears unless ``leave``; yield what is told (done, in all)."""
        started = time.perf_counter()
        with self._open_bar(title, 1, initial=0, leave=leave) as bar:

            def advance(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield advance
        if self._bar is not None and not self._bar.disable:
            # Evaluation is no training: what it took counts neither as elapsed nor for the rest.
            self._bar.start_t += time.perf_counter() - started

    def _open_bar(self, title: str, total: int, *, initial: int, leave: bool) -> Any:
        from tqdm import tqdm

        in_terminal = sys.stderr.isatty()
        return tqdm(
            desc=title,
            total=total,
            initial=initial,
            leave=leave,
            # In a file, bars that disappear would only leave their control characters.
            disable=not self._enabled or not (leave or in_terminal),
            bar_format=_FORMAT,
            dynamic_ncols=in_terminal,
            # The mean speed since the start: a moving one jumps with every line in a file.
            smoothing=0,
            mininterval=0.2 if in_terminal else _SECONDS_BETWEEN_LINES_IN_A_FILE,
            file=_Stderr(),
        )


class _Stderr:
    """Standard error, which may go away: a run must not end because nobody watches it any more."""

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)
