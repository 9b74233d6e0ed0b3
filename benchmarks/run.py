"""What does ProDiaL cost here, against everything one could use instead?

One command measures, prints tables, and writes JSON, CSV and pictures:

    python -m benchmarks.run                    # the full table of projectors, minutes
    python -m benchmarks.run --quick            # the strongest rivals only
    python -m benchmarks.run --table            # only the view against the targets
    python -m benchmarks.run --base main        # and compare with another version
    python -m benchmarks.run --level step       # one whole training step
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.warm import compile_all, prepare_process

prepare_process()

import torch  # noqa: E402

from benchmarks import cases, environment, measure, modules, rivals, store, views  # noqa: E402
from benchmarks.cases import Case, CaseSet  # noqa: E402
from benchmarks.compare import (  # noqa: E402
    ComparisonError,
    checked_out,
    compare,
    comparison_view,
)
from benchmarks.measure import Settings  # noqa: E402
from benchmarks.rivals import FLOOR, OURS, Rival  # noqa: E402
from benchmarks.roofline import measure_ceilings  # noqa: E402
from benchmarks.scaling import SWEEPS, TINY_SWEEPS, fits, fits_view  # noqa: E402
from benchmarks.shapes import MODELS  # noqa: E402

Plan = list[tuple[Case, Sequence[Rival], Settings]]


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.run", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    option = parser.add_argument
    option("--level", choices=("projector", *modules.LEVELS), default="projector")
    option("--quick", action="store_true", help="the strongest rivals, fewer samples")
    option("--table", action="store_true", help="print only the view against the targets")
    option(
        "--scaling",
        action="store_true",
        help="sweeps over M, K and N, P, r instead; of a step, over layers",
    )
    option("--model", help=f"shapes of one model: {', '.join(MODELS)}")
    option("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    option("--only", default="", help="rivals by name, separated by commas; the floor is added")
    option("--base", help="git reference, or folder with a prodial_kernels, to compare with")
    option("--tiny", action="store_true", help="tiny shapes on a CPU: tries the suite out")
    option("--output", type=Path, help="folder for results (default benchmarks/results/<device>)")
    option("--load", type=Path, help="print and draw a saved result instead of measuring")
    return parser


def plan_of(options: argparse.Namespace) -> tuple[Plan, Mapping[str, tuple[Case, ...]]]:
    """Return what to measure, case by case, and the sweeps among it."""
    chosen = rivals.select(_names(options.only), strong=options.quick or options.scaling)
    settings = measure.QUICK if options.quick else Settings()
    if options.tiny:
        settings = measure.TINY
    bare = replace(settings, forward=False, eager=False, kernels=False)
    if options.scaling:
        sweeps = TINY_SWEEPS if options.tiny else SWEEPS
        swept = dict.fromkeys(case for sweep in sweeps.values() for case in sweep)
        return [(case, chosen, bare) for case in swept], sweeps
    found = _case_set(options)
    variants = found.variants if not options.quick or options.table else ()
    alone = [rival for rival in chosen if rival.name in (FLOOR, OURS)]
    plan: Plan = [(case, chosen, settings) for case in found.cases]
    return plan + [(case, alone, bare) for case in variants], {}


def main(arguments: list[str] | None = None) -> int:
    """Run what the options say.

    Returns:
        1 where a rival was refused or failed, or ProDiaL became slower than the base; 2 for options
        that cannot be followed.
    """
    options = build_parser().parse_args(arguments)
    try:
        return _run(options, list(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, OSError, ComparisonError) as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    if options.load:
        saved = store.read(options.load)
        _print_record(saved, options.table)
        _draw(saved, saved["sweeps"], options.output or options.load.parent)
        return 0
    if not options.tiny and not torch.cuda.is_available():
        raise ValueError("needs a CUDA device, found none; --tiny tries the suite out on a CPU")
    if options.tiny and options.output is None:
        raise ValueError("--tiny needs --output: its figures are no results")
    device = "cpu" if options.tiny else "cuda"
    command = shlex.join(["python", "-m", "benchmarks.run", *arguments])
    record: dict[str, Any] = {
        "name": _name(options), "environment": environment.describe(device, command),
        "clocks_before": environment.clocks(), "seconds": {}, "rows": [], "sweeps": {},
    }  # fmt: skip
    if options.level != "projector":
        _measure_modules(options, device, record)
    else:
        with ExitStack() as stack:
            # A reference that does not exist is found out before the measurement.
            base = stack.enter_context(checked_out(options.base)) if options.base else None
            _measure_projectors(options, device, record)
            if base is not None:
                _compare(options, base, device, record)
    record["clocks_after"] = environment.clocks()
    if record["rows"]:
        _print_record(record, options.table)
        folder = store.folder_of(record, options.output)
        _draw(record, record["sweeps"], folder)
        print(*store.write(record, folder), sep="\n")
    if any(row["status"].startswith(("refused", "failed")) for row in record["rows"]):
        return 1
    return int(any(verdict["word"] == "slower" for verdict in record.get("comparison", ())))


def _measure_projectors(options: argparse.Namespace, device: str, record: dict[str, Any]) -> None:
    plan, sweeps = plan_of(options)
    record["sweeps"] = {size: [asdict(case) for case in sweep] for size, sweep in sweeps.items()}
    if device == "cuda":
        tasks = [(case, r.name) for case, some, _ in plan for r in some if r.compiles]
        seconds, failures = compile_all(tasks)
        record["seconds"]["compile"] = seconds
        print(f"compiled {len(tasks)} variants in {seconds:.0f} s", flush=True)
        for failure in failures:
            print(f"  not compiled beforehand: {failure}", flush=True)
    start = time.perf_counter()
    ceilings = measure_ceilings(device, plan[0][0].torch_dtype, tiny=options.tiny)
    record["ceilings"] = asdict(ceilings)
    print(
        f"{record['environment']['device']}: {ceilings.flops / 1e12:.0f} TFLOP/s in a large "
        f"product, {ceilings.bandwidth / 1e9:.0f} GB/s in a copy",
        flush=True,
    )

    def report(rows: list[measure.Row]) -> None:
        if not options.table:
            print("\n" + views.case_view(rows), flush=True)

    record["rows"] = measure.measure_all(plan, device, ceilings, report)
    record["seconds"]["measure"] = time.perf_counter() - start


def _compare(options: argparse.Namespace, base: Path, device: str, record: dict[str, Any]) -> None:
    start = time.perf_counter()
    rounds = 5 if options.tiny else 10
    compared = _case_set(options).cases
    verdicts = compare(base, environment.ROOT, compared, device, rounds)
    record["comparison"] = [{**asdict(verdict), "word": verdict.word} for verdict in verdicts]
    record["base"] = options.base
    record["seconds"]["compare"] = time.perf_counter() - start
    print("\n" + comparison_view(verdicts, options.base), flush=True)


def _measure_modules(options: argparse.Namespace, device: str, record: dict[str, Any]) -> None:
    chosen = modules.module_cases(
        options.level, options.model, quick=options.quick, scaling=options.scaling
    )
    if options.tiny:
        layers = (1, 2) if options.scaling else (1,)
        tiny = replace(chosen[0], batch=1, length=8, dtype="float32")
        chosen = [replace(tiny, layers=count) for count in layers]
    methods = _names(options.only) or modules.METHODS
    unknown = [name for name in methods if name not in modules.METHODS]
    if unknown:
        raise ValueError(f"only: expected some of {', '.join(modules.METHODS)}; got {unknown[0]}")
    rounds = 2 if options.tiny else 5 if options.quick else 15
    start = time.perf_counter()
    for case in chosen:
        rows = modules.measure_modules(case, methods, device, rounds)
        record["rows"] += rows
        print("\n" + modules.modules_view(rows), flush=True)
    if options.scaling:
        print("\n" + modules.layers_view(record["rows"]))
    record["seconds"]["measure"] = time.perf_counter() - start


def _case_set(options: argparse.Namespace) -> CaseSet:
    if options.tiny:
        return CaseSet(cases.TINY, (replace(cases.TINY[0], p=12),))
    shapes = cases.model_cases(options.model) if options.model else cases.TABLE_SHAPES
    return cases.with_variants([replace(case, dtype=options.dtype) for case in shapes])


def _print_record(record: Mapping[str, Any], table_only: bool) -> None:
    rows = record["rows"]
    if not rows or "m" not in rows[0]:
        return
    sweeps = _sweeps_of(record)
    if sweeps:
        print("\n" + fits_view(fits(rows, sweeps)))
        return
    print("\n" + views.targets_view(rows))
    if not table_only:
        spent = ", ".join(f"{name} {took:.0f} s" for name, took in record["seconds"].items())
        print(f"\n{record['environment']['command']}: {spent}")


def _draw(record: Mapping[str, Any], sweeps: Mapping[str, Any], folder: Path) -> None:
    if record["rows"] and "m" in record["rows"][0]:
        from benchmarks.charts import draw_all

        for path in draw_all(record, _sweeps_of({"sweeps": sweeps}), folder):
            print(path)


def _sweeps_of(record: Mapping[str, Any]) -> dict[str, tuple[Case, ...]]:
    return {size: tuple(Case(**case) for case in sweep) for size, sweep in record["sweeps"].items()}


def _name(options: argparse.Namespace) -> str:
    parts = [options.level, options.model]
    parts += [name for name in ("scaling", "quick") if getattr(options, name)]
    if options.only:
        parts.append("only")
    if options.dtype != "bfloat16":
        parts.append(options.dtype)
    return "-".join(part for part in parts if part)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    warnings.simplefilter("default")
    sys.exit(main())
