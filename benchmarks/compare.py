"""This working tree against another: two processes that take turns on the same device.

Both run the suite of this tree on their own ``prodial_kernels``. The frozen layer, which has
none of our code in it, is timed in both as a control: how far it is from 1 is what two
processes differ by anyway.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.environment import ROOT
from benchmarks.harness.pool import PATIENCE_S
from benchmarks.harness.process import Worker, WorkerError
from benchmarks.harness.text import text_table
from benchmarks.jobs import Job
from benchmarks.projector.cases import Case
from benchmarks.projector.measure import BARE
from benchmarks.projector.rivals import FLOOR, OURS

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
    base: Path, head: Path, cases: Sequence[Case], device: str, rounds: int = 10,
    start: Callable[[str, Path], Worker] = Worker,
) -> list[Verdict]:  # fmt: skip
    """Compare two trees that hold a ``prodial_kernels``, case by case.

    Raises:
        ComparisonError: One of them does not run the suite, or computes something else.
    """
    verdicts = []
    try:
        with ExitStack() as stack:
            workers = [stack.enter_context(start(device, root)) for root in (base, head)]
            for case in cases:
                job = Job("table", case, (FLOOR, OURS), BARE)
                # Both prepare at once: what takes long there is compiling.
                for worker in workers:
                    worker.ask("prepare", task=job)
                for worker in workers:
                    worker.prepared(PATIENCE_S)
                samples: tuple[list[dict[str, float]], ...] = ([], [])
                for turn in range(rounds):
                    # Who goes first alternates.
                    for which in (0, 1) if turn % 2 == 0 else (1, 0):
                        workers[which].ask("sample")
                        samples[which].append(workers[which].answer(PATIENCE_S)["sample"])
                verdicts.append(judge(str(case), *samples))
    except WorkerError as error:
        raise ComparisonError(str(error)) from None
    return verdicts


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


def comparison_table(verdicts: Sequence[Verdict], base: str) -> str:
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
