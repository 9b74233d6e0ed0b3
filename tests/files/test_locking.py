"""One process at a time in a directory, whatever lock the system has."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prodial_kernels.files import locking
from prodial_kernels.files.atomic import beside, left_beside
from prodial_kernels.files.locking import LOCK_FILE, AlreadyLocked, locked
from prodial_kernels.files.process import has_ended, process_name


class _Windows:
    """What ``msvcrt`` does, among the descriptors of this process."""

    LK_NBLCK, LK_UNLCK = 2, 0

    def __init__(self) -> None:
        self.held: dict[tuple[int, int], int] = {}

    def locking(self, descriptor: int, mode: int, n_bytes: int) -> None:
        assert n_bytes == 1
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == 0
        found = os.fstat(descriptor)
        key = (found.st_dev, found.st_ino)
        if mode == self.LK_UNLCK:
            assert self.held.pop(key) == descriptor
        elif key in self.held:
            raise PermissionError(errno.EACCES, "Permission denied")
        else:
            self.held[key] = descriptor


@pytest.fixture(params=["flock", "no flock here", "windows", "nothing"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which locks the system has."""
    kind: str = request.param
    modules: dict[str, Any] = {"fcntl": None}
    if kind == "windows":
        modules["msvcrt"] = _Windows()
    if kind == "no flock here":

        def flock(*_: Any) -> None:
            raise OSError(errno.EBADF, "Bad file descriptor")

        modules = {"fcntl": SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4)}
    if kind != "flock":
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
    return kind


def test_one_at_a_time(tmp_path: Path, kind: str) -> None:
    for _ in range(2):
        with locked(tmp_path):
            with (
                pytest.raises(AlreadyLocked, match="another process is running in"),
                locked(tmp_path),
            ):
                pass
            # It was not given up by the one that failed.
            with pytest.raises(AlreadyLocked), locked(tmp_path):
                pass
    assert not list(tmp_path.iterdir())


def test_waits_for_the_other(tmp_path: Path, kind: str) -> None:
    entered = threading.Event()

    def hold() -> None:
        with locked(tmp_path):
            entered.set()
            time.sleep(0.05)

    other = threading.Thread(target=hold)
    other.start()
    entered.wait()
    with locked(tmp_path, wait=30.0):
        assert not other.join()
    assert not list(tmp_path.iterdir())


def test_an_error_gives_it_back(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        1 / 0  # noqa: B018
    with locked(tmp_path):
        pass


def test_a_directory_that_is_not_there(tmp_path: Path, kind: str) -> None:
    with pytest.raises(FileNotFoundError), locked(tmp_path / "none"):
        pass


def test_a_lock_file_of_a_dead_process_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    dead = f"{process_name().partition('-')[0]}-{2**22 + 1}"
    (tmp_path / LOCK_FILE).write_text(f"{dead} 0123\n")
    with locked(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text().startswith(process_name())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["00000000-1 ab\n", "", "\x00\xff", "../../x-1 ab", "ab"])
def test_a_lock_file_of_who_knows_whom_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    (tmp_path / LOCK_FILE).write_text(content)
    with pytest.raises(AlreadyLocked, match=r"remove .*\.lock"), locked(tmp_path):
        pass
    assert (tmp_path / LOCK_FILE).read_text() == content


def test_modules_that_a_system_lacks() -> None:
    assert locking._module("no_such_module") is None
    if sys.platform == "linux":
        assert locking._module("fcntl") is not None
        assert locking._module("msvcrt") is None


def test_names_tell_whether_their_process_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not has_ended(process_name())
    machine = process_name().partition("-")[0]
    assert has_ended(f"{machine}-{2**22 + 1}")
    assert not has_ended(f"{machine[::-1]}-{2**22 + 1}")
    for strange in ("", "-", machine, f"{machine}-0", f"{machine}--1", f"{machine}-x"):
        assert not has_ended(strange)
    ours = beside(tmp_path / "x", "partial")
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 2**22 + 1)
        theirs = beside(tmp_path / "x", "partial")
    for path in (ours, theirs, tmp_path / ".x.partial", beside(tmp_path / "xy", "partial")):
        path.touch()
    assert left_beside(tmp_path / "x", "partial") == sorted([ours, theirs])
    assert left_beside(tmp_path / "x", "partial", ended=True) == [theirs]
    assert not left_beside(tmp_path / "x", "previous")
