"""Two files, one commit: whatever stops a save, and wherever, the old or the new adapter loads."""

from __future__ import annotations

import builtins
import hashlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prodial_kernels.checkpoint.error import AdapterError
from prodial_kernels.checkpoint.files import CONFIG_FILE, TENSOR_FILE, read_files, write_files

OLD, NEW = b"old tensors" * 1000, b"new tensors" * 1000


class Stop(BaseException):
    """Not an Exception: like KeyboardInterrupt, it passes every ordinary handler."""


class Steps:
    """Counts the system calls of a save and stops before, or half way through, the n-th."""

    def __init__(self, stop_at: int | None, stop: Callable[[], None]) -> None:
        self.stop_at = stop_at
        self.stop = stop
        self.count = 0

    def __call__(self, half: Callable[[], object] = lambda: None) -> None:
        self.count += 1
        if self.count == self.stop_at:
            half()
            self.stop()

    def install(self, patch: Callable[[Any, str, Any], None]) -> None:
        real_open = builtins.open
        steps = self

        class File:
            """A file whose writes are steps: nothing buffered, so that half means half."""

            def __init__(self, path: Any, mode: str) -> None:
                self._file = real_open(path, mode, buffering=0)

            def __enter__(self) -> File:
                return self

            def __exit__(self, *error: object) -> None:
                self._file.close()

            def write(self, data: bytes) -> None:
                steps(lambda: self._file.write(data[: len(data) // 2]))
                self._file.write(data)

            def flush(self) -> None:
                steps()

            def fileno(self) -> int:
                return self._file.fileno()

        def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if mode != "xb":
                return real_open(path, mode, *args, **kwargs)
            steps()
            return File(path, mode)

        patch(builtins, "open", opened)
        for name in ("fsync", "replace", "unlink", "mkdir"):
            patch(os, name, self._counted(getattr(os, name)))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self()
            result = real(*args, **kwargs)
            # Also just after: the change happened, and nobody was told.
            self()
            return result

        return call


def raising(error: BaseException) -> Callable[[], None]:
    def stop() -> None:
        raise error

    return stop


def save(directory: Path, payload: bytes) -> None:
    write_files(directory, {"config": {"name": payload[:3].decode()}}, payload)


def check_whole(directory: Path) -> bytes:
    """Read the adapter; its two files belong together, whichever save they are of."""
    header, payload = read_files(directory)
    assert payload in (OLD, NEW)
    assert header["config"] == {"name": payload[:3].decode()}
    return payload


def count_steps(directory: Path) -> int:
    steps = Steps(None, raising(Stop()))
    with pytest.MonkeyPatch.context() as patch:
        steps.install(lambda target, name, new: patch.setattr(target, name, new))
        save(directory, NEW)
    return steps.count


@pytest.mark.parametrize(
    "error", [Stop(), KeyboardInterrupt(), OSError(28, "No space left on device")], ids=repr
)
def test_an_error_at_any_step(tmp_path: Path, error: BaseException) -> None:
    save(tmp_path / "count", OLD)
    total = count_steps(tmp_path / "count")
    assert total > 15
    seen = set()
    for step in range(1, total + 1):
        directory = tmp_path / str(step)
        save(directory, OLD)
        before = {path.name: path.read_bytes() for path in directory.iterdir()}
        with pytest.MonkeyPatch.context() as patch:
            steps = Steps(step, raising(error))
            steps.install(lambda target, name, new: patch.setattr(target, name, new))
            try:
                save(directory, NEW)
            except type(error):
                pass
            else:
                # pathlib ignores an error of mkdir where the directory exists.
                assert isinstance(error, OSError)
                assert check_whole(directory) == NEW
        seen.add(check_whole(directory))
        if check_whole(directory) == OLD:
            # Cleaned up: nothing but the old adapter remains.
            assert {path.name: path.read_bytes() for path in directory.iterdir()} == before, step
        check_next_save(directory)
    assert seen == {OLD, NEW}


def check_next_save(directory: Path) -> None:
    """A save after a stopped one works and leaves exactly its two files."""
    survived = check_whole(directory)
    for payload in (survived, NEW, OLD):
        save(directory, payload)
        assert check_whole(directory) == payload
        assert sorted(path.name for path in directory.iterdir()) == [CONFIG_FILE, TENSOR_FILE]


def test_a_kill_at_any_step_of_the_first_save(tmp_path: Path) -> None:
    for step in range(1, count_steps(tmp_path / "count") + 1):
        directory = tmp_path / str(step)
        killed_at(step, directory, NEW)
        if (directory / CONFIG_FILE).exists():
            assert check_whole(directory) == NEW
        else:
            with pytest.raises(AdapterError, match=r"no such directory|is missing"):
                read_files(directory)
        save(directory, OLD)
        check_next_save(directory)


@pytest.mark.parametrize("payload", [OLD, NEW], ids=["same", "other"])
def test_a_kill_at_any_step_and_another_in_the_save_after_it(
    tmp_path: Path, payload: bytes
) -> None:
    """Also when the same tensors are saved again, so that names and hashes coincide."""
    save(tmp_path / "count", OLD)
    total = count_steps(tmp_path / "count")
    left = set()
    for step in range(1, total + 1):
        directory = tmp_path / str(step)
        save(directory, OLD)
        killed_at(step, directory, payload)
        left.add(check_whole(directory))
        for second in range(1, total + 10, 3):
            again = tmp_path / f"{step}-{second}"
            shutil.copytree(directory, again)
            survived = check_whole(again)
            killed_at(second, again, OLD)
            assert check_whole(again) in (survived, OLD)
            shutil.rmtree(again)
        check_next_save(directory)
    assert left == {OLD, payload}


class Killed(BaseException):
    pass


def killed_at(step: int, directory: Path, payload: bytes) -> None:
    """Save, and let nothing of the process touch the disk from the given step on."""
    dead = False

    def die() -> None:
        nonlocal dead
        dead = True
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        steps = Steps(step, die)
        steps.install(lambda target, name, new: patch.setattr(target, name, new))
        for name in ("replace", "unlink", "fsync", "mkdir"):
            alive = getattr(os, name)

            def call(*args: Any, alive: Callable[..., Any] = alive, **kwargs: Any) -> Any:
                if dead:
                    raise Killed
                return alive(*args, **kwargs)

            patch.setattr(os, name, call)
        try:
            save(directory, payload)
        except Killed:
            assert dead


def test_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    save(tmp_path, OLD)
    stale = tmp_path / f"adapter_model.{hashlib.sha256(b'x').hexdigest()}.pending"
    stale.write_bytes(b"half of x")
    (tmp_path / f".{CONFIG_FILE}.tmp").write_text("{")
    (tmp_path / "README.md").write_text("not ours")
    save(tmp_path, NEW)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md", CONFIG_FILE, TENSOR_FILE
    ]  # fmt: skip


def test_a_reader_beside_a_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole save between the reader's two reads: it reads again."""
    save(tmp_path, OLD)
    real, saves = Path.read_bytes, iter([NEW])

    def read_bytes(path: Path) -> bytes:
        if path.name == TENSOR_FILE:
            for payload in saves:
                monkeypatch.setattr(Path, "read_bytes", real)
                save(tmp_path, payload)
                monkeypatch.setattr(Path, "read_bytes", read_bytes)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert check_whole(tmp_path) == NEW


def test_a_committed_adapter_loads_from_a_directory_that_is_read_only(tmp_path: Path) -> None:
    save(tmp_path, NEW)
    digest = hashlib.sha256(NEW).hexdigest()
    (tmp_path / TENSOR_FILE).rename(tmp_path / f"adapter_model.{digest}.pending")
    (tmp_path / TENSOR_FILE).write_bytes(OLD)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert check_whole(tmp_path) == NEW
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_second_saver_and_a_reader_at_any_step(tmp_path: Path) -> None:
    """The second waits, whatever its first look finds; the reader finds one whole pair."""
    save(tmp_path / "count", OLD)
    for step in range(1, count_steps(tmp_path / "count") + 1):
        directory = tmp_path / str(step)
        save(directory, OLD)
        second = threading.Thread(target=save, args=(directory, OLD))

        def others(directory: Path = directory, second: threading.Thread = second) -> None:
            second.start()
            second.join(0.002)
            check_whole(directory)

        with pytest.MonkeyPatch.context() as patch:
            steps = Steps(step, others)
            steps.install(lambda target, name, new: patch.setattr(target, name, new))
            save(directory, NEW)
            second.join()
        assert check_whole(directory) in (OLD, NEW)
        assert sorted(path.name for path in directory.iterdir()) == [CONFIG_FILE, TENSOR_FILE]


# One process imports the package; for every line it gets, it forks a child that saves for ever,
# beside another one that is not killed.
WRITER = """
    import itertools, os, signal, sys
    from pathlib import Path
    from prodial_kernels.checkpoint.files import write_files

    OLD, NEW = b"old tensors" * 1000, b"new tensors" * 1000

    def save_for_ever():
        child = os.fork()
        if child == 0:
            for payload in itertools.cycle((NEW, OLD)):
                write_files(Path(sys.argv[1]), {"config": {"name": payload[:3].decode()}}, payload)
        return child

    other = save_for_ever()
    for line in sys.stdin:
        child = save_for_ever()
        print(child, flush=True)
        os.waitpid(child, 0)
        print("dead", flush=True)
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sigkill(tmp_path: Path) -> None:
    save(tmp_path, OLD)
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(WRITER), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        found = set()
        for kill in itertools.count():
            process.stdin.write("go\n")
            process.stdin.flush()
            child = int(process.stdout.readline())
            time.sleep(0.001 + 0.0007 * (kill % 40))
            os.kill(child, signal.SIGKILL)
            assert process.stdout.readline() == "dead\n"
            found.add(check_whole(tmp_path))
            # On a busy machine some children die before they have saved anything.
            if kill >= 40 and (len(found) == 2 or kill >= 1000):
                break
        process.stdin.close()
    assert process.returncode == 0
    assert found == {OLD, NEW}
    check_next_save(tmp_path)
