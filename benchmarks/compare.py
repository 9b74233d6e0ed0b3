"""This working tree against another: two processes that take turns on the same device.

Both run the suite of this tree on their own ``prodial_kernels``. The frozen layer, which has
none of our code in it, is timed in both as a control: how far it is from 1 is what two
processes differ by anyway.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.cases import Case
from benchmarks.environment import ROOT
from benchmarks.rivals import FLOOR, OURS
from benchmarks.views import text_table

# A change of less than this is not called one, however steady the samples.
SMALLEST = 0.03


class ComparisonError(Exception):
    """The other version cannot be had or cannot run; the message says which and why."""


@dataclass(frozen=True)
class Verdict:
    """ProDiaL's time here over its time at the base, from samples taken in turn.

    Attributes:
        ratio: Median over the rounds.
        control: The same for the frozen layer; 1 but for noise.
        noise: How far from 1 a ratio may be without meaning anything.
    """

    case: str
    base_us: float
    head_us: float
    ratio: float
    control: float
    noise: float

    @property
    def word(self) -> str:
        """``"slower"``, ``"faster"`` or ``"same"``."""
        if self.ratio > 1 + self.noise:
            return "slower"
        return "faster" if self.ratio < 1 / (1 + self.noise) else "same"


def judge(case: str, base: Sequence[dict[str, float]], head: Sequence[dict[str, float]]) -> Verdict:
    """Compare rounds of samples; ``base[i]`` and ``head[i]`` were taken one after the other."""
    ratios = sorted(h[OURS] / b[OURS] for b, h in zip(base, head, strict=True))
    controls = [h[FLOOR] / b[FLOOR] for b, h in zip(base, head, strict=True)]
    control = statistics.median(controls)
    last = len(ratios) - 1
    width = ratios[math.ceil(0.8 * last)] - ratios[math.floor(0.2 * last)]
    noise = max(SMALLEST, 2 * abs(control - 1), width / math.sqrt(len(ratios)))
    return Verdict(
        case,
        statistics.median(sample[OURS] for sample in base),
        statistics.median(sample[OURS] for sample in head),
        statistics.median(ratios), control, noise,
    )  # fmt: skip


def compare(
    base: Path, head: Path, cases: Sequence[Case], device: str, rounds: int = 10
) -> list[Verdict]:
    """Compare two trees that hold a ``prodial_kernels``, case by case.

    Raises:
        ComparisonError: One of them does not run the suite, or fails its gate.
    """
    verdicts = []
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(root, device)) for root in (base, head)]
        for case in cases:
            # Both prepare at once: what takes long there is compiling.
            for worker in workers:
                worker.ask({"do": "prepare", "case": asdict(case)})
            for worker in workers:
                worker.answer()
            samples: tuple[list[dict[str, float]], ...] = ([], [])
            for turn in range(rounds):
                # Who goes first alternates.
                for which in (0, 1) if turn % 2 == 0 else (1, 0):
                    workers[which].ask({"do": "sample"})
                    samples[which].append(workers[which].answer())
            verdicts.append(judge(str(case), *samples))
    return verdicts


class Worker:
    """A process that measures with the ``prodial_kernels`` under ``root``."""

    def __init__(self, root: Path, device: str) -> None:
        if not (root / "prodial_kernels").is_dir():
            raise ComparisonError(f"base: {root} has no folder prodial_kernels")
        self.root = root
        self._folder = tempfile.TemporaryDirectory(prefix="prodial-compare-")
        # The process runs in a folder where the package is theirs and the suite is ours.
        place = Path(self._folder.name)
        (place / "prodial_kernels").symlink_to((root / "prodial_kernels").resolve())
        (place / "benchmarks").symlink_to(ROOT / "benchmarks")
        self._log = (place / "log").open("w+")
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", "--device", device],
            cwd=place, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip

    def ask(self, message: dict[str, Any]) -> None:
        """Send one request."""
        assert_pipe(self._process.stdin).write(json.dumps(message) + "\n")
        assert_pipe(self._process.stdin).flush()

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to the last request."""
        line = assert_pipe(self._process.stdout).readline()
        answer = json.loads(line) if line else {"error": f"it ended: {self._tail()}"}
        if "error" in answer:
            raise ComparisonError(f"{self.root}: {answer['error']}")
        return dict(answer)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert_pipe(pipe).close()
        try:
            # It ends when its requests do.
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        self._folder.cleanup()

    def _tail(self) -> str:
        self._log.seek(0)
        return self._log.read()[-2000:]


def assert_pipe(pipe: Any) -> Any:
    """The pipe, which is None only if the process was made without one."""
    if pipe is None:
        raise ComparisonError("the worker has no pipe")
    return pipe


@contextmanager
def checked_out(reference: str) -> Iterator[Path]:
    """A folder with the ``prodial_kernels`` of a git reference, or of a folder given as such.

    Raises:
        ComparisonError: No such reference, or no git repository.
    """
    if (Path(reference) / "prodial_kernels").is_dir():
        yield Path(reference)
        return
    with tempfile.TemporaryDirectory(prefix="prodial-base-") as folder:
        # Under a name of its own: a run that is killed leaves a folder, which git can prune.
        tree = Path(folder) / "tree"
        command = ["git", "-C", str(ROOT), "worktree"]
        done = subprocess.run(
            [*command, "add", "--quiet", "--detach", str(tree), reference],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            raise ComparisonError(
                f"base: expected a git reference or a folder with prodial_kernels; "
                f"got {reference!r}: {done.stderr.strip()}"
            )
        try:
            yield tree
        finally:
            subprocess.run([*command, "remove", "--force", str(tree)], capture_output=True)


def comparison_view(verdicts: Sequence[Verdict], base: str) -> str:
    """The verdicts as a table."""
    lines = [
        [
            verdict.case, f"{verdict.base_us:.1f}", f"{verdict.head_us:.1f}",
            f"{verdict.ratio:.3f}", f"{verdict.control:.3f}", f"{100 * verdict.noise:.1f}",
            verdict.word.upper() if verdict.word == "slower" else verdict.word,
        ]
        for verdict in verdicts
    ]  # fmt: skip
    headers = [f"against {base}", "base µs", "here µs", "ratio", "control", "noise %", ""]
    return text_table(headers, lines)
