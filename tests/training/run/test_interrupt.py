"""Signals that ask to stop: noted during a step, raised otherwise, and not taken from others."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from prodial_kernels.training.run.signals import Interrupted, StopSignals

HANDLED = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU]
REPEATED = [signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU]


def send(*signals: signal.Signals) -> None:
    for signum in signals:
        os.kill(os.getpid(), signum)


@pytest.fixture(autouse=True)
def _handlers_come_back() -> Iterator[None]:
    before = [signal.getsignal(signum) for signum in HANDLED]
    yield
    assert [signal.getsignal(signum) for signum in HANDLED] == before


@pytest.mark.parametrize("signum", HANDLED, ids=lambda s: s.name)
def test_raised_outside_a_step_and_after_it(signum: signal.Signals) -> None:
    with StopSignals(), pytest.raises(Interrupted) as caught:
        send(signum)
    assert caught.value.exit_code == 128 + signum
    assert str(caught.value) == signum.name
    with StopSignals() as signals:
        with signals.deferred():
            send(signum)
        with pytest.raises(Interrupted):
            signals.check()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_second_one_that_means_now_is_raised_during_a_step(signum: signal.Signals) -> None:
    with StopSignals() as signals, signals.deferred():
        send(signum)
        with pytest.raises(Interrupted):
            send(signum)


@pytest.mark.parametrize("signum", REPEATED, ids=lambda s: s.name)
def test_one_that_comes_again_and_again_does_not_disturb_the_saving(
    signum: signal.Signals,
) -> None:
    with StopSignals() as signals:
        with signals.deferred():
            send(signum, signum, signal.SIGHUP, signum)
            # The system's own end of a session: SIGHUP, then SIGTERM.
            send(signal.SIGTERM, signum)
        with pytest.raises(Interrupted, match="SIGTERM"):
            signals.check()
        # Cleaning up after it.
        send(signum)
        with signals.deferred():
            send(signum)


@pytest.mark.parametrize("signum", REPEATED, ids=lambda s: s.name)
@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_left_alone_where_ignored_or_taken(signum: signal.Signals, handler: object) -> None:
    """As under nohup, or in a batch system's own wrapper."""
    before = signal.signal(signum, handler)  # type: ignore[arg-type]
    try:
        with StopSignals():
            assert signal.getsignal(signum) is handler
            send(signum)
    finally:
        signal.signal(signum, before)


def test_systems_that_have_but_two(monkeypatch: pytest.MonkeyPatch) -> None:
    for signum in REPEATED:
        monkeypatch.delattr(signal, signum.name)
    with StopSignals(), pytest.raises(Interrupted):
        send(signal.SIGTERM)
