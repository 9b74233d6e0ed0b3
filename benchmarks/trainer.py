"""What a step costs in transformers' ``Trainer``, beside PEFT's LoRA there.

``python -m benchmarks.trainer`` trains models of transformers with random weights of the published
sizes, in bf16 with rank 16, in the ``Trainer`` with its defaults, and takes the wall time of a step
and its peak memory, all in one process, one variant after the other:

* ``frozen``: the model as it ships, its last norm trained and a gradient through every block;
* ``prodial``: ``apply_prodial``, both projectors;
* ``captured``: that, with ``CaptureCallback()``;
* ``lora-fused``: PEFT's LoRA on what the fused path leaves it, ``in_proj`` (and ``x_proj``);
* ``lora-unfused``: PEFT's LoRA on both projectors, the fused path off.

The peak counts what the pool of the graphs holds, also where it is free at the time; beside it is
what the allocator counts (``max_memory_allocated``).
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.harness.startup import prepare_process

prepare_process()

import torch  # noqa: E402

from benchmarks import targets  # noqa: E402
from benchmarks.harness.environment import describe  # noqa: E402
from benchmarks.harness.memory import release  # noqa: E402
from benchmarks.harness.rows import ratio, reported  # noqa: E402
from benchmarks.harness.store import results_of  # noqa: E402
from benchmarks.models.rows import ModelRow, shapes_of, write_rows  # noqa: E402
from benchmarks.models.upstream import notes  # noqa: E402
from benchmarks.training.trainer_steps import CONFIGS, VARIANTS, Settings, measure, profiled  # noqa: E402

SHAPES = ((4, 512), (8, 2048))
TINY_SHAPES = ((2, 16),)
BUDGET_S = 230.0


def judge(rows: Sequence[ModelRow]) -> None:
    """Add ratios to the frozen model, and to the captured rows what they must keep."""
    for row in rows:
        same = {r.variant: r for r in rows if r.case == row.case and r.status == "ok"}
        floor = same.get("frozen")
        row.time_ratio = ratio(row.ms, floor.ms if floor else None)
        row.judge(_limits(row, same) if row.variant == "captured" and row.status == "ok" else [])


def _limits(row: ModelRow, same: Mapping[str, ModelRow]) -> list[tuple[str, bool]]:
    """What a captured row is held to, beside the ``same`` case's other variants."""
    limits = []
    ms = row.ms or 0.0
    if (most := targets.TRAINER_MS.get(row.case)) is not None:
        limits.append((f"<= {most:g} ms", ms <= most))
    loras = [same[name].ms or 0.0 for name in ("lora-fused", "lora-unfused") if name in same]
    if (most := targets.TRAINER_OF_LORA.get(row.case)) is not None and loras:
        share = ms / min(loras)
        limits.append((f"{share:.2f} <= {most} LoRA", share <= most))
    most = targets.TRAINER_OF_FROZEN.get(row.case)
    if most is not None and row.time_ratio is not None:
        limits.append((f"<= {most} frozen", row.time_ratio <= most))
    plain = same["prodial"].peak_mib if "prodial" in same else None
    if plain is not None and row.peak_mib is not None:
        limits.append((f"<= {plain:,.0f} MiB uncaptured", row.peak_mib <= plain))
    return limits


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trainer", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    option = parser.add_argument
    option("--output", type=Path, help="JSON (default benchmarks/results/<device>/trainer.json)")
    option("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS))
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
        shapes = shapes_of(options.shapes)
    cases = [
        (model, *shape, variant)
        for shape in shapes
        for model in options.models
        for variant in options.variants
    ]
    if options.profile:
        for case in cases:
            print(*case)
            print(profiled(*case, settings))
        return 0

    command = shlex.join(["python", "-m", "benchmarks.trainer", *given])
    record = {**describe(settings.device, command), "notes": notes(settings.configurations)}
    output = options.output or results_of(record["device"]) / "trainer.json"
    rows: list[ModelRow] = []
    dropped: list[str] = []
    for case in cases:
        if time.monotonic() - started > options.budget:
            dropped.append(" ".join(map(str, case)))
            continue
        row = ModelRow(*case)
        with reported(row):
            for name, figure in measure(*case, settings).items():
                setattr(row, name, figure)
            row.status = "ok"
        if row.status != "ok":
            release(settings.device, workspaces=True)
        rows.append(row)
        judge(rows)
        print(f"{time.monotonic() - started:6.1f} s  {row}", flush=True)
        write_rows(output, {**record, "dropped": dropped}, rows)
    if dropped:
        print("dropped, as the time was over: " + "; ".join(dropped))
    write_rows(output, {**record, "dropped": dropped}, rows)
    print("\n" + "\n".join(map(str, rows)))
    print(f"{output}, {time.monotonic() - started:.0f} s")
    return int(not all(row.ok for row in rows))


if __name__ == "__main__":
    sys.exit(main())
