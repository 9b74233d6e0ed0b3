"""Whether a process of this machine is still there."""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path

import pytest

from prodial_kernels.training.distributed import world as worlds
from prodial_kernels.training.distributed.launch import Launch
from prodial_kernels.training.distributed.life import Life, is_alive, own_life


def life_of(process: subprocess.Popen[bytes]) -> Life:
    own = own_life()
    assert own is not None
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return Life(own.host, process.pid, int(fields[19]))


@pytest.fixture
def sleeper():
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_a_killed_process_is_gone_before_it_is_waited_for(sleeper) -> None:
    life = life_of(sleeper)
    assert is_alive(life)
    # Another process of the same number, and one of another machine.
    assert not is_alive(life._replace(started=life.started - 1))
    assert not is_alive(life._replace(host="elsewhere"))
    sleeper.kill()
    deadline = time.monotonic() + 10
    while is_alive(life) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(life)
    assert is_alive(own_life())


class Silent:
    """A store in which nobody has left anything."""

    def check(self, keys: list[str]) -> bool:
        return False


def test_waiting_for_a_process_that_is_gone_ends(sleeper, monkeypatch) -> None:
    monkeypatch.setattr(worlds, "_SECONDS_FOR_A_MESSAGE", 0.1)
    world = worlds.World(Launch(0, 2), Silent())
    world._neighbours = {1: life_of(sleeper)}
    began = time.monotonic()

    def kill_late() -> bool:
        if time.monotonic() - began > 0.7:
            sleeper.kill()
        return False

    with pytest.raises(worlds.PeerError, match=r"without a word \(process 1 of 2 is gone\)"):
        world.poll(kill_late)


def test_a_gpu_waits_for_none_that_is_gone(sleeper, monkeypatch) -> None:
    """Whatever this process does meanwhile: what it waits in is ended, and what comes is no sum."""
    monkeypatch.setattr(worlds, "_SECONDS_FOR_A_MESSAGE", 0.1)
    world = worlds.World(Launch(0, 2), Silent())
    world._neighbours = {1: life_of(sleeper)}
    ended: list[float] = []
    arrived = threading.Event()

    def abort() -> None:
        ended.append(time.monotonic())
        arrived.set()
        raise RuntimeError("broken already")

    world.guard(abort)
    world.poll(lambda: True)
    sleeper.kill()
    assert arrived.wait(10)
    with pytest.raises(worlds.PeerError, match="process 1 of 2 is gone"):
        world.poll(arrived.is_set)
    world.break_off()
    assert len(ended) == 1


def test_after_a_run_others_may_end(sleeper) -> None:
    world = worlds.World(Launch(0, 2), Silent())
    world._neighbours = {1: life_of(sleeper)}
    world.guard(lambda: None)
    world.unguard()
    sleeper.kill()
    time.sleep(0.7)
    world.poll(lambda: True)
