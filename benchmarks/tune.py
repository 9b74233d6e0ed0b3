"""Sweep the kernels' launch configurations and write the table of the fastest.

    python -m benchmarks.tune [--model mamba-130m] [--only backward] [--budget SECONDS] [--write]

For each shape the search starts from what the package's rules choose and changes one field at a
time, keeping what makes the whole step faster. Every configuration is checked against fp64 before
it is timed: a compiler can get some of them wrong. When the budget is spent, the search ends with
what it found. Without ``--write`` the table is only printed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.harness.startup import prepare_process

prepare_process()

import torch  # noqa: E402

from benchmarks.harness.environment import ROOT, cache_bytes, cpu_count  # noqa: E402
from benchmarks.harness.timing import Replay, interleave  # noqa: E402
from benchmarks.projector.cases import TABLE_SHAPES, Case, draw, model_cases, rotating_sets  # noqa: E402
from benchmarks.projector.descent import Changes, Value, descend, field_of  # noqa: E402
from benchmarks.projector.gate import Gate, Refusal  # noqa: E402
from benchmarks.projector.rivals import OURS, Rival, select  # noqa: E402
from benchmarks.projector.rivals.layer import Step  # noqa: E402
from prodial_kernels.kernels.choices.tile_sizes import padded_rank  # noqa: E402
from prodial_kernels.kernels.choices.tuned import (  # noqa: E402
    Key,
    device_family,
    key_of,
    with_fields,
)
from prodial_kernels.kernels.choices.tuned_table import TABLE  # noqa: E402
from prodial_kernels.kernels.replay.recorded_calls import forget  # noqa: E402

Entries = dict[Key, dict[str, Value]]
TABLE_FILE = ROOT / "prodial_kernels" / "kernels" / "choices" / "tuned_table.py"
# The module that asks for configurations; the choosers are replaced there and nowhere else.
CALLER = "prodial_kernels.kernels.projector.passes"
BUDGET_S = 540.0
_GEMM: Mapping[str, tuple[Value, ...]] = {
    "block_m": (64, 128), "block_n": (64, 128, 256), "block_k": (32, 64, 128),
    "num_warps": (4, 8), "num_stages": (2, 3, 4, 5), "group_m": (4, 8, 16),
    "flatten": (False, True), "subtile": (False, True),
}  # fmt: skip
_SIDE: Mapping[str, tuple[Value, ...]] = {
    "block_m": (32, 64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8),
    "num_stages": (2, 3, 4), "items": (132, 264, 396, 528, 792),
}  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """The values to try for one choice.

    Attributes:
        kernel: The name that the table's key has.
        chooser: The function of :data:`CALLER` that returns the configuration.
        values: By field; ``outer.inner`` inside a nested dataclass. Fields that a configuration
            no longer has are an error, so that a sweep cannot silently do nothing.
    """

    kernel: str
    chooser: str
    values: Mapping[str, Sequence[Value]]


SWEEPS = (
    Sweep("forward_gemm", "choose_gemm", _GEMM),
    Sweep(
        "backward", "choose_backward",
        {
            "companion": (False, True), "among": (False, True), "late": (False, True),
            "side_processors": (0, 8, 16, 24, 32),
            **{f"gemm.{name}": values for name, values in _GEMM.items()},
            "gemm.max_registers": (0, 168),
            **{f"output_side.{name}": values for name, values in _SIDE.items()},
        },
    ),
    Sweep(
        "input_side", "choose_input_side",
        {
            "block_m": (16, 32, 64), "window": (32, 64, 128), "num_warps": (4, 8),
            "num_stages": (2, 3, 4, 5), "programs": (132, 264, 396, 528, 660),
        },
    ),
)  # fmt: skip


@contextmanager
def chosen(chooser: str, changes: Changes, caller: str = CALLER) -> Iterator[list[Any]]:
    """Let ``chooser`` return its own choice with ``changes``; yield what it returned.

    The table is left out meanwhile.

    Raises:
        ValueError: The caller has no such function, or its configuration no such field.
    """
    module = importlib.import_module(caller)
    original = getattr(module, chooser, None)
    if original is None:
        raise ValueError(f"chooser: {caller} has no {chooser}")
    returned: list[Any] = []

    def choose(*arguments: Any, **options: Any) -> Any:
        returned.append(with_fields(original(*arguments, **options), changes))
        return returned[-1]

    setattr(module, chooser, choose)
    reads_table = module.tuned
    module.tuned = lambda default, key: default  # type: ignore[attr-defined]
    # A call that was met before would be launched as it was recorded, and nothing chosen.
    forget()
    try:
        yield returned
    finally:
        setattr(module, chooser, original)
        module.tuned = reads_table  # type: ignore[attr-defined]
        forget()


class Search:
    """Tunes one case. ``compile`` makes candidates ready in parallel and says which of them run."""

    def __init__(
        self, case: Case, device: str, compile: Callable[[Case, str, Sequence[Changes]], list[bool]]
    ) -> None:
        self.case, self.device, self.compile = case, device, compile
        self.gate = Gate(case, device)
        count = rotating_sets(case, cache_bytes(device))
        self.sets = [draw(case, device, seed) for seed in range(count)]

    def tune(self, sweep: Sweep, until: float = math.inf) -> dict[str, Value]:
        """Return the worthwhile changes to what ``sweep.chooser`` returns on this case.

        Args:
            sweep: What to try.
            until: When to stop, on :func:`time.monotonic`'s clock.
        """
        with chosen(sweep.chooser, {}) as returned:
            unchanged = self._replay()
        if not returned:
            raise ValueError(f"chooser: {sweep.chooser} was not asked on {self.case}")
        start = {name: field_of(returned[0], name) for name in sweep.values}
        # All single changes at once fill every process; most of the search is among them.
        singles = [
            {name: value}
            for name, values in sweep.values.items()
            for value in values
            if value != start[name]
        ]
        ran = dict(zip(map(_frozen, singles), self._compile(sweep, singles), strict=True))

        def evaluate(candidates: Sequence[Changes]) -> list[float | None]:
            new = [changes for changes in candidates if _frozen(changes) not in ran]
            ran.update(zip(map(_frozen, new), self._compile(sweep, new), strict=True))
            return [
                self._relative(sweep.chooser, changes, unchanged) if ran[_frozen(changes)] else None
                for changes in candidates
            ]

        return descend(sweep.values, evaluate, start, until=until)

    def _compile(self, sweep: Sweep, candidates: Sequence[Changes]) -> list[bool]:
        return self.compile(self.case, sweep.chooser, candidates) if candidates else []

    def _relative(self, chooser: str, changes: Changes, unchanged: Replay) -> float | None:
        try:
            with chosen(chooser, changes):
                self.gate.check(ours())
                replay = self._replay()
        except Refusal as refusal:
            print(f"  WRONG {dict(changes)}: {refusal}", flush=True)
            return None
        samples = interleave({"unchanged": unchanged, "changed": replay}, rounds=8, warm_s=0.0)
        return statistics.median(samples["changed"]) / statistics.median(samples["unchanged"])

    def _replay(self) -> Replay:
        steps = [Step.on(operands, ours().prepare).both for operands in self.sets]
        for step in steps:
            step()
        return Replay(steps, self.device)


def _frozen(changes: Changes) -> frozenset[tuple[str, Value]]:
    return frozenset(changes.items())


class Compilers:
    """Processes that compile candidates and run each once, so that a crash is theirs."""

    def __init__(self) -> None:
        self._pool = self._start()

    def __call__(self, case: Case, chooser: str, candidates: Sequence[Changes]) -> list[bool]:
        """Leave the kernels of every candidate on disk; return which of them ran."""
        futures = [self._pool.submit(compile_one, case, chooser, changes) for changes in candidates]
        errors = [future.exception() for future in futures]
        for changes, error in zip(candidates, errors, strict=True):
            if error is not None:
                # Too much shared memory, or a shape that the compiler does not take.
                print(f"  {dict(changes)}: {type(error).__name__}: {str(error)[:80]}", flush=True)
        if any(isinstance(e, BrokenProcessPool) or "CUDA error" in str(e) for e in errors if e):
            # After an illegal access a process can use the device no more.
            self.close()
            self._pool = self._start()
        return [error is None for error in errors]

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown()

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(max(1, cpu_count() - 1), mp_context=get_context("spawn"))


def compile_one(case: Case, chooser: str, changes: Changes) -> None:
    """Run one step of a candidate in a process of its own, which leaves its kernels on disk."""
    with chosen(chooser, changes):
        Step.on(draw(case, "cuda"), ours().prepare).both()


def ours() -> Rival:
    """The package's own entry among the rivals."""
    return next(rival for rival in select([OURS]) if rival.name == OURS)


def table_text(entries: Mapping[Key, Changes]) -> str:
    """The table's file, one entry a line, sorted."""
    lines = [f"    {key!r}: {dict(sorted(entries[key].items()))!r}," for key in sorted(entries)]
    body = "\n".join(["{", *lines, "}"]).replace("'", '"') if lines else "{}"
    return (
        '"""Written by ``python -m benchmarks.tune``. Data only: see ``tuned.py`` for the key."""\n'
        "\n# fmt: off\n# ruff: noqa: E501\n"
        "from collections.abc import Mapping\n\n"
        "TABLE: Mapping[tuple[str, str, int, int, int, int, str], Mapping[str, int | bool]] = "
        f"{body}\n"
    )


def key_for(sweep: Sweep, case: Case) -> Key:
    """The table's key of a sweep on a case, on the device at hand."""
    properties = torch.cuda.get_device_properties("cuda")
    family = device_family((properties.major, properties.minor), properties.multi_processor_count)
    return key_of(sweep.kernel, family, case.m, case.n, case.k, padded_rank(case.r), case.dtype)


def main(arguments: list[str] | None = None) -> int:
    """Tune, print the entries, and write the table where asked to."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.tune", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    kernels = [sweep.kernel for sweep in SWEEPS]
    parser.add_argument("--model", help="shapes of one model (default: those of the table)")
    parser.add_argument("--only", choices=kernels, action="append", help="may be repeated")
    parser.add_argument(
        "--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="for the whole search"
    )
    parser.add_argument("--write", action="store_true", help=f"update {TABLE_FILE.name}")
    parser.add_argument("--output", type=Path, default=TABLE_FILE, help="where --write writes")
    options = parser.parse_args(arguments)
    until = time.monotonic() + options.budget
    if not torch.cuda.is_available():
        print("benchmarks.tune: needs a CUDA device, found none", file=sys.stderr)
        return 2
    try:
        cases = model_cases(options.model) if options.model else TABLE_SHAPES
    except ValueError as error:
        print(f"benchmarks.tune: {error}", file=sys.stderr)
        return 2
    entries: Entries = {key: dict(entry) for key, entry in TABLE.items()}
    compilers = Compilers()
    sweeps = [s for s in SWEEPS if not options.only or s.kernel in options.only]
    for count, case in enumerate(cases):
        if time.monotonic() > until:
            left = "; ".join(str(case) for case in cases[count:])
            print(f"the time is over, not searched: {left}", flush=True)
            break
        search = Search(case, "cuda", compilers)
        for sweep in sweeps:
            key = key_for(sweep, case)
            # Every shape gets its share of what is left.
            share = (until - time.monotonic()) / (len(cases) - count) / len(sweeps)
            found = search.tune(sweep, time.monotonic() + share)
            print(f"{case} {sweep.kernel}: {json.dumps(found)}", flush=True)
            entries.pop(key, None)
            if found:
                entries[key] = found
    compilers.close()
    print(table_text(entries))
    if options.write:
        options.output.write_text(table_text(entries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
