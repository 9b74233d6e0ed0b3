"""What a step costs in transformers' ``Trainer``, beside PEFT's LoRA there.

``python -m benchmarks.trainer`` trains models of transformers with random weights of the published
sizes, in bf16 with rank 16, in the ``Trainer`` with its defaults, and takes the wall time of a step
and its peak memory, all in one process, one variant after the other:

* ``frozen``: the model as it ships, its last norm trained and a gradient through every block;
* ``prodial``: ``apply_prodial``, both projectors;
* ``captured``: that, with ``CaptureCallback()``;
* ``lora-fused``: PEFT's LoRA on what the fused path leaves it, ``in_proj`` (and ``x_proj``);
* ``lora-unfused``: PEFT's LoRA on both projectors, the fused path off;
* ``captured-unwatched``, at the first shape: ``captured`` with ``logging_nan_inf_filter=False``, so
  that the ``Trainer`` does not wait for each loss.

The peak counts what the pool of the graphs holds, also where it is free at the time; beside it is
what the allocator counts (``max_memory_allocated``).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness.startup import prepare_process

prepare_process()

import torch  # noqa: E402

from benchmarks.harness.environment import describe, device_name, slug  # noqa: E402
from benchmarks.harness.store import RESULTS  # noqa: E402
from benchmarks.mixers import notes  # noqa: E402
from benchmarks.projector.measure import release, reported  # noqa: E402
from benchmarks.training.trainer_steps import MODELS, VARIANTS, Settings, measure, profiled  # noqa: E402

SHAPES = ((4, 512), (8, 2048))
TINY_SHAPES = ((2, 16),)
BUDGET_S = 230.0
# Of the captured variant: at most so many ms, of the faster LoRA's time, of the frozen model's.
MUST_MS = {("mamba-130m", 4, 512): 24.0}
MUST_OF_LORA = {("mamba2-130m", 4, 512): 0.35}
MUST_OF_FROZEN = {("mamba-130m", 8, 2048): 0.85, ("mamba2-130m", 8, 2048): 0.85}


@dataclass(frozen=True)
class Row:
    """One variant of one model at one shape."""

    model: str
    batch: int
    length: int
    variant: str
    status: str = "ok"
    ms: float | None = None
    allocated_mib: float | None = None
    peak_mib: float | None = None
    pool_free_mib: float | None = None
    reserved_mib: float | None = None
    time_ratio: float | None = None
    must: str = ""
    ok: bool = True

    def __str__(self) -> str:
        head = f"{self.model:12} {f'{self.batch}x{self.length}':>7} {self.variant:>12}"
        if self.status != "ok" or self.ms is None:
            return f"{head} {self.status}"
        text = f"{head} {self.ms:9.2f} ms"
        if self.time_ratio is not None:
            text += f" {self.time_ratio:5.2f}x"
        if self.peak_mib is not None and self.reserved_mib is not None:
            text += f" {self.peak_mib:8,.0f} MiB ({self.reserved_mib:,.0f} reserved"
            text += f", {self.allocated_mib:,.0f} allocated)" if self.allocated_mib else ")"
        if self.must:
            text += f"  must {self.must}  {'ok' if self.ok else 'MISSED'}"
        return text


def judged(rows: Sequence[Row]) -> list[Row]:
    """Add ratios to the frozen model, and to the captured rows what they must keep."""
    ratios = []
    for row in rows:
        floor = _of(rows, row, "frozen")
        if floor is not None and floor.ms is not None and row.ms is not None:
            row = replace(row, time_ratio=row.ms / floor.ms)
        ratios.append(row)
    return [_judged(ratios, row) if row.variant == "captured" else row for row in ratios]


def _judged(rows: Sequence[Row], row: Row) -> Row:
    if row.status != "ok" or row.ms is None:
        return replace(row, ok=row.status.startswith("unavailable"))
    case = (row.model, row.batch, row.length)
    limits = []
    if case in MUST_MS:
        limits.append((f"<= {MUST_MS[case]:g} ms", row.ms <= MUST_MS[case]))
    loras = [_of(rows, row, name) for name in ("lora-fused", "lora-unfused")]
    times = [lora.ms for lora in loras if lora is not None and lora.ms is not None]
    if case in MUST_OF_LORA and times:
        share = row.ms / min(times)
        limits.append((f"{share:.2f} <= {MUST_OF_LORA[case]} LoRA", share <= MUST_OF_LORA[case]))
    if case in MUST_OF_FROZEN and row.time_ratio is not None:
        most = MUST_OF_FROZEN[case]
        limits.append((f"<= {most} frozen", row.time_ratio <= most))
    plain = _of(rows, row, "prodial")
    if plain is not None and plain.peak_mib is not None and row.peak_mib is not None:
        limits.append((f"<= {plain.peak_mib:,.0f} MiB uncaptured", row.peak_mib <= plain.peak_mib))
    return replace(
        row, must=", ".join(text for text, _ in limits), ok=all(kept for _, kept in limits)
    )


def _of(rows: Sequence[Row], row: Row, variant: str) -> Row | None:
    case = (row.model, row.batch, row.length, variant)
    same = (r for r in rows if (r.model, r.batch, r.length, r.variant) == case)
    return next((r for r in same if r.status == "ok"), None)


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trainer", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    option = parser.add_argument
    option("--output", type=Path, help="JSON (default benchmarks/results/<device>/trainer.json)")
    option("--models", nargs="+", choices=MODELS, default=list(MODELS))
    option("--shapes", nargs="+", metavar="BxL", help="default: 4x512 8x2048")
    option("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    option("--steps", type=int, default=20, help="that count (default 20)")
    option(
        "--configurations", type=int, default=2, metavar="N",
        help="let upstream's Mamba-2 kernels choose among N of theirs (default 2; 0 for all)",
    )  # fmt: skip
    option("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="then drop the rest")
    option("--profile", action="store_true", help="print the host's profile of each run instead")
    option("--tiny", action="store_true", help="tiny models on a CPU: tries the command out")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, write it as JSON; return 1 if a row failed or misses what it must keep."""
    started = time.monotonic()
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = build_parser().parse_args(given)
    if not options.tiny and not torch.cuda.is_available():
        print("benchmarks.trainer: needs a CUDA device, found none", file=sys.stderr)
        return 2
    if options.tiny and options.output is None:
        print("benchmarks.trainer: --tiny needs --output, it is no result", file=sys.stderr)
        return 2
    settings = Settings(steps=options.steps, configurations=options.configurations)
    if options.tiny:
        settings = Settings(device="cpu", warm_up=2, steps=2, configurations=0, tiny=True)
    shapes: Sequence[tuple[int, int]] = TINY_SHAPES if options.tiny else SHAPES
    if options.shapes:
        shapes = [(int(b), int(n)) for b, n in (shape.split("x") for shape in options.shapes)]
    cases = [
        (model, *shape, variant)
        for model in options.models
        for shape in shapes
        for variant in options.variants
        if variant != "captured-unwatched" or shape == shapes[0]
    ]
    if options.profile:
        for case in cases:
            print(*case)
            print(profiled(*case, settings))
        return 0

    command = shlex.join(["python", "-m", "benchmarks.trainer", *given])
    name = slug(device_name(settings.device))
    output = options.output or RESULTS / name / "trainer.json"
    record = {
        **describe(settings.device, command), "notes": notes(settings.configurations)
    }  # fmt: skip
    rows: list[Row] = []
    dropped = []
    for case in cases:
        if time.monotonic() - started > options.budget:
            dropped.append(" ".join(map(str, case)))
            continue
        model, batch, length, variant = case
        found: dict[str, Any] = {"status": "ok"}
        with reported(found):
            found |= measure(model, batch, length, variant, settings)
        if found["status"] != "ok":
            release(settings.device, workspaces=True)
        rows.append(Row(model, batch, length, variant, **found))
        print(judged(rows)[-1], flush=True)
        write({**record, "dropped": dropped}, judged(rows), output)
    if dropped:
        print("dropped, as the time was over: " + "; ".join(dropped))
    write({**record, "dropped": dropped}, judged(rows), output)
    final = judged(rows)
    print("\n" + "\n".join(map(str, final)))
    print(f"{output}, {time.monotonic() - started:.0f} s")
    failed = [row for row in final if row.status.startswith(("failed", "refused"))]
    return int(bool(failed) or not all(row.ok for row in final))


def write(record: dict[str, Any], rows: Sequence[Row], path: Path) -> None:
    """Write the rows with what they were measured on; whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps({**record, "rows": [*map(vars, rows)]}, indent=2) + "\n")
    unfinished.replace(path)


if __name__ == "__main__":
    sys.exit(main())
