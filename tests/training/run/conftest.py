"""Signals as in a terminal, however the tests are run."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _a_hang_up_is_not_ignored() -> Iterator[None]:
    """Under nohup it is, and then a run takes no notice of it either."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
