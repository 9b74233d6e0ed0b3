"""Does it learn? The study of adapters on Mamba, from pretraining to the leaderboard.

    python -m benchmarks.quality corpus --work W --out C     English and code as tokens
    python -m benchmarks.quality tasks --work W --out T      tasks, and the glyphs to pretrain on
    python -m benchmarks.quality pretrain --base mamba2-31m --data C --out S --max-seconds 200
    python -m benchmarks.quality export --state S --data C --out B
    python -m benchmarks.quality run --base B --tasks T --rows R --task meaning word --methods core
    python -m benchmarks.quality check --base B --tasks T --rows R --task word --methods all
    python -m benchmarks.quality report --rows R --out L
    python -m benchmarks.quality row ID --base B --tasks T --rows R
    python -m benchmarks.quality analyse --base B --tasks T --task section --method ft-both --out A

``corpus`` and ``tasks`` need a Debian system that reaches its package archive; the others need no
network. See the README beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.bases.shapes import SHAPES, build, load_base, save_base
from benchmarks.quality.methods.budgets import BUDGETS
from benchmarks.quality.study.row import Recipe, Row, read_rows
from benchmarks.quality.study.runner import Plan

__all__ = ["main"]

KINDS = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def _say(**facts: Any) -> None:
    print(json.dumps(facts, ensure_ascii=False), flush=True)


def _corpus(args: argparse.Namespace) -> int:
    from benchmarks.quality.bases.corpus import build as build_corpus
    from benchmarks.quality.bases.sources import sources_named

    english, code = sources_named(args.packages)
    args.out.mkdir(parents=True, exist_ok=True)
    record = build_corpus(english, code, args.work, args.out, vocab_size=args.vocab_size)
    _say(splits=record["splits"])
    return 0


def _tasks(args: argparse.Namespace) -> int:
    from benchmarks.quality.tasks.registry import MAKERS
    from benchmarks.quality.tasks.task import save_task

    path = args.out / "tasks.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in args.only or MAKERS:
        record[name] = save_task(MAKERS[name](name, args.work), args.out)
        _say(task=name, **{k: v for k, v in record[name].items() if k != "sources"})
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def _data(
    name: str, folder: Path, length: int, sample: int, device: torch.device
) -> tuple[Any, int]:
    """Return what a base is pretrained on, and its outputs."""
    from benchmarks.quality.bases.pretrain import Images, Text

    if SHAPES[name].kind == "vision":
        from benchmarks.quality.tasks.task import ImageTask, load_task

        task = load_task(folder, "letters")
        assert isinstance(task, ImageTask)
        train, held = (
            tuple(torch.from_numpy(a).to(device) for a in task.splits[split])
            for split in ("train", "test")
        )
        return Images((train[0], train[1]), (held[0], held[1])), len(task.classes)
    from benchmarks.quality.bases.corpus import SPLITS, read_split

    streams: dict[str, torch.Tensor] = {}
    lengths = torch.zeros(0)
    for split in SPLITS:
        ids, lengths = read_split(folder, split)
        streams[split] = ids.to(device)
    return Text(streams.pop("train"), streams, lengths, length, sample), len(lengths)


def _prepare_kernels(device: torch.device, configurations: int) -> None:
    """Load upstream's kernels, and let those that tune themselves choose among a few."""
    if device.type != "cuda":
        return
    import causal_conv1d  # noqa: F401
    import mamba_ssm.ops.selective_scan_interface
    import mamba_ssm.ops.triton.ssd_combined  # noqa: F401

    from benchmarks.models.upstream import limit_configurations
    from prodial_kernels.embedded.making.architecture import has_fused_kernels

    limit_configurations(configurations)
    _say(fused_kernels=has_fused_kernels(), configurations=configurations)


def _pretrain(args: argparse.Namespace) -> int:
    from benchmarks.quality.bases.pretrain import Options, pretrain

    device = torch.device(args.device)
    _prepare_kernels(device, args.configurations)
    data, outputs = _data(args.base, args.data, args.length, args.sample, device)
    model = build(args.base, outputs, args.seed).to(device)
    torch.set_float32_matmul_precision("high")
    about = {
        "base": args.base,
        "outputs": outputs,
        "length": args.length,
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    _say(**about)
    options = Options(
        max_seconds=args.max_seconds,
        max_steps=args.max_steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate or SHAPES[args.base].learning_rate,
        warmup_steps=args.warmup_steps,
        final=args.final,
        decay_share=args.decay_share,
        save_seconds=args.save_seconds,
        evaluate_seconds=args.evaluate_seconds,
        seed=args.seed,
    )
    progress = pretrain(model, data, options, args.out, about=about, matrices=KINDS[args.matrices])
    _say(steps=progress.step, seconds=round(progress.seconds, 1), pieces=progress.pieces)
    return 0


def _export(args: argparse.Namespace) -> int:
    from benchmarks.quality.bases.card import write_card
    from benchmarks.quality.bases.checkpoint import (
        CheckpointError,
        load_state,
        read_record,
        restore,
    )

    record = read_record(args.state)
    if record is None:
        raise CheckpointError(f"state: expected state.json in {args.state}; `pretrain` writes it")
    model = build(record["base"], record["outputs"])
    restore(load_state(args.state), model)
    kind = SHAPES[record["base"]].kind
    card = {
        "name": args.name or record["base"],
        "shape": record["base"],
        "kind": kind,
        **{k: record[k] for k in ("outputs", "parameters", "device", "torch", "progress")},
    }
    save_base(model, args.out, card, None if kind == "vision" else args.data)
    write_card(args.out, record, args.data)
    _say(written=str(args.out), **card["progress"]["history"][-1])
    return 0


def _recipe(args: argparse.Namespace) -> Recipe:
    return Recipe(
        steps=args.steps,
        batch_size=args.batch_size,
        max_length=args.max_length,
        limit=args.limit,
    )


def _plan(args: argparse.Namespace) -> Plan:
    number, count = (int(part) for part in args.part.split("/"))
    return Plan(
        args.base, args.task, args.methods, args.budgets, args.seeds, _recipe(args),
        (number, count),
    )  # fmt: skip


def _run(args: argparse.Namespace) -> int:
    from benchmarks.quality.study.runner import run

    device = torch.device(args.device)
    if not args.side_by_side:
        _prepare_kernels(device, args.configurations)
    plan = _plan(args)
    if args.side_by_side:
        from benchmarks.quality.side_by_side.runner import run_stacks

        made = run_stacks(
            plan, args.tasks, args.rows, device=device, at_once=args.side_by_side,
            products=args.products, fused=not args.eager, seconds=args.max_seconds,
        )  # fmt: skip
    else:
        made = run(plan, args.tasks, args.rows, device=device, seconds=args.max_seconds)
    _say(made=made, cells=len(plan.cells()))
    return 0


def _check(args: argparse.Namespace) -> int:
    from benchmarks.quality.study.check import check

    device = torch.device(args.device)
    _prepare_kernels(device, args.configurations)
    rows = check(_plan(args), args.tasks, args.rows, device=device, seconds=args.max_seconds)
    failed = [row.spec.method for row in rows if row.status == "failed"]
    _say(rows=len(rows), failed=failed)
    return 1 if failed else 0


def _time(args: argparse.Namespace) -> int:
    from benchmarks.quality.side_by_side.measure import measure

    found = measure(
        _plan(args), args.tasks, device=torch.device(args.device), sizes=args.runs, ways=args.ways,
        seconds=args.max_seconds, profile=args.profile, say=_say,
    )  # fmt: skip
    return 1 if any("error" in figures for figures in found) else 0


def _report(args: argparse.Namespace) -> int:
    from benchmarks.quality.report.leaderboard import leaderboard, write

    board = leaderboard(read_rows(args.rows), args.note)
    for path in write(board, args.out):
        print(path)
    return 0


def _find(rows: Path, wanted: str) -> Row:
    found = [row for row in read_rows(rows) if row.spec.id.startswith(wanted)]
    if not found or len({row.spec.id for row in found}) > 1:
        raise ValueError(f"row: expected the beginning of one id in {rows}, got {wanted!r}, which "
                         f"{len({row.spec.id for row in found})} have")  # fmt: skip
    # A final row has the test split's figure, too.
    return sorted(found, key=lambda row: row.phase)[0]


def _row(args: argparse.Namespace) -> int:
    from benchmarks.quality.study.train import data_of, run_row
    from benchmarks.quality.tasks.task import load_task

    device = torch.device(args.device)
    _prepare_kernels(device, args.configurations)
    recorded = _find(args.rows, args.id)
    base = load_base(args.base)
    if base.name != recorded.spec.base:
        raise ValueError(f"base: the row's is {recorded.spec.base}, got {base.name}")
    base.model.to(device)
    data = data_of(base, load_task(args.tasks, recorded.spec.task), recorded.spec.recipe, device)
    again = run_row(base, data, recorded.spec, recorded.phase, device)
    names = ("validation", "test", "loss")
    now = {name: again.figures.get(name) for name in names}
    then = {name: recorded.figures.get(name) for name in names}
    _say(id=recorded.spec.id, cell=recorded.spec.cell, recorded=then, again=now, same=now == then)
    return 0 if again.status == recorded.status else 1


def _analyse(args: argparse.Namespace) -> int:
    from benchmarks.quality.analysis.transform import analyse, projector_weights
    from benchmarks.quality.study.row import Spec
    from benchmarks.quality.study.train import data_of, run_row
    from benchmarks.quality.tasks.task import load_task

    device = torch.device(args.device)
    _prepare_kernels(device, args.configurations)
    base = load_base(args.base)
    base.model.to(device)
    before = projector_weights(base.model)
    about: dict[str, Any] = {"base": base.name}
    if args.trained is not None:
        after = projector_weights(load_base(args.trained).model.to(device))
        about["trained"] = str(args.trained)
    else:
        kept: dict[str, torch.Tensor] = {}
        spec = Spec(
            base.name, args.task, args.method, args.budget, args.learning_rate, args.seed,
            _recipe(args),
        )  # fmt: skip
        data = data_of(base, load_task(args.tasks, args.task), spec.recipe, device)
        row = run_row(
            base, data, spec, "final", device, lambda model: kept.update(projector_weights(model))
        )
        after = kept
        about |= {"row": json.loads(row.to_json())}
    result = {**about, **analyse(before, after, args.out)}
    (args.out / "transform.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for projector, mean in result["mean"].items():
        _say(projector=projector, **{key: round(value, 5) for key, value in mean.items()})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(required=True)

    def command(name: str, call: Any, about: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about)
        made.set_defaults(call=call)
        return made

    def on_device(made: argparse.ArgumentParser) -> None:
        made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        made.add_argument(
            "--configurations", type=int, default=2,
            help="among how many of theirs upstream's Mamba-2 kernels choose (0: all)",
        )  # fmt: skip

    def recipe(made: argparse.ArgumentParser) -> None:
        made.add_argument("--steps", type=int, default=Recipe.steps)
        made.add_argument("--batch-size", type=int, default=Recipe.batch_size)
        made.add_argument("--max-length", type=int, default=Recipe.max_length)
        made.add_argument("--limit", type=int, default=0, help="score so many examples (0: all)")

    made = command("corpus", _corpus, "download English and code; write tokens")
    made.add_argument("--work", type=Path, required=True, help="archives and text")
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--packages", nargs="*", default=[], help="only these (default: all)")
    made.add_argument("--vocab-size", type=int, default=8192)

    made = command("tasks", _tasks, "download and write the tasks")
    made.add_argument("--work", type=Path, required=True)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--only", nargs="*", default=[], help="only these (default: all)")

    made = command("pretrain", _pretrain, "train a piece, from the last checkpoint on")
    made.add_argument("--base", choices=SHAPES, required=True)
    made.add_argument("--data", type=Path, required=True, help="what corpus (or tasks) wrote")
    made.add_argument("--out", type=Path, required=True, help="the checkpoint, in parts")
    made.add_argument("--max-seconds", type=float, default=200.0)
    made.add_argument("--max-steps", type=int, default=10**9)
    made.add_argument("--batch-size", type=int, default=128)
    made.add_argument("--length", type=int, default=512, help="tokens a window")
    made.add_argument("--sample", type=int, default=200_000, help="held-out tokens to measure on")
    made.add_argument("--learning-rate", type=float)
    made.add_argument("--warmup-steps", type=int, default=200)
    made.add_argument("--final", action="store_true", help="lower the rate to zero at the end")
    made.add_argument("--decay-share", type=float, default=0.3)
    made.add_argument("--save-seconds", type=float, default=60.0)
    made.add_argument("--evaluate-seconds", type=float, default=30.0)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--matrices", choices=KINDS, default="bfloat16", help="in a checkpoint")
    on_device(made)

    made = command("export", _export, "write a checkpoint as a base, with its card")
    made.add_argument("--state", type=Path, required=True)
    made.add_argument("--data", type=Path, required=True)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--name", help="of the base in rows (default: its shape's)")

    alone = command("run", _run, "run the rows that are missing")
    alone.add_argument(
        "--side-by-side", type=int, default=0, metavar="RUNS",
        help="train so many runs at once in one model (Mamba and VisionMamba; 0: one by one)",
    )  # fmt: skip
    alone.add_argument(
        "--products", choices=("bfloat16", "tf32"), default="tf32",
        help="of matrices, side by side on a GPU (bfloat16: with --eager)",
    )  # fmt: skip
    alone.add_argument("--eager", action="store_true", help="without Triton, side by side")
    timed = command("time", _time, "how long rows take side by side, in every way")
    timed.add_argument("--runs", type=int, nargs="+", default=[32])
    timed.add_argument("--ways", nargs="+", default=["tf32 eager", "tf32", "bfloat16 eager"])
    timed.add_argument("--profile", action="store_true", help="and which kernels take the time")
    for made in (
        alone,
        timed,
        command("check", _check, "one short row of every method: does it run here?"),
    ):
        made.add_argument("--base", required=True, help="a folder of export, or 'embedded'")
        made.add_argument("--tasks", type=Path, required=True)
        made.add_argument("--rows", type=Path, required=made is not timed)
        made.add_argument("--task", nargs="+", required=True)
        made.add_argument("--methods", nargs="+", default=["core"], help="names, or sets of them")
        made.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS))
        made.add_argument("--seeds", type=int, default=5)
        made.add_argument("--part", default="0/1", metavar="I/N", help="this process of N")
        made.add_argument("--max-seconds", type=float, default=float("inf"))
        recipe(made)
        on_device(made)

    made = command("report", _report, "write the leaderboard")
    made.add_argument("--rows", type=Path, required=True)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--note", default="", help="what readers must know first")

    made = command("row", _row, "run a row again, from its seed")
    made.add_argument("id")
    made.add_argument("--base", required=True)
    made.add_argument("--tasks", type=Path, required=True)
    made.add_argument("--rows", type=Path, required=True)
    on_device(made)

    made = command("analyse", _analyse, "T = W⁺W' of trained projectors, with pictures")
    made.add_argument("--base", required=True)
    made.add_argument("--trained", help="a base of the same shape, trained elsewhere")
    made.add_argument("--tasks", type=Path)
    made.add_argument("--task")
    made.add_argument("--method", default="ft-both")
    made.add_argument("--budget", default="own")
    made.add_argument("--learning-rate", type=float, default=3e-4)
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--out", type=Path, required=True)
    recipe(made)
    on_device(made)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; see the module's docstring.

    Returns:
        0, or 1 where ``row`` ends in another way than recorded; 2 for what cannot be done.
    """
    args = _parser().parse_args(argv)
    try:
        status: int = args.call(args)
    except ValueError as error:
        print(f"benchmarks.quality: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
