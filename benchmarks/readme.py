"""The parts of the README files that are made from committed results: pictures, and tables.

``python -m benchmarks.run --render`` writes them; a test compares them with the results.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.environment import ROOT
from benchmarks.harness.store import RESULTS
from benchmarks.harness.text import number, text_table
from benchmarks.models.methods import SLOW
from benchmarks.models.rows import ModelRow
from benchmarks.projector import tables
from benchmarks.projector.rivals import FLOOR, IN_FP8, OURS
from benchmarks.projector.rows import find
from benchmarks.report import charts, report
from benchmarks.report.record import Record
from benchmarks.targets import PROJECTOR_IN_FP8
from benchmarks.training import shared_tables, table
from benchmarks.training.jobs import PRODIAL
from benchmarks.training.learning.in_fp8 import LearningRow, summary

# What a reader is likely to use today; the best of the others has a column of its own.
SHOWN = ("peft-lora", "authors")
# Of the fine-tuning jobs, those on the front page.
FRONT_JOBS = (
    "nano-4b-all", "nemotron-8b-all", "30b-a3b-streamed", "7b-all-lean", "1.4b-bf16-lean",
    "1.4b-bf16", "7b-nf4",
)  # fmt: skip


def render(paths: Sequence[Path]) -> int:
    """Draw results, print their tables, and put what is committed into the README files.

    Args:
        paths: Results of ``benchmarks.run``; none for all that are committed.

    Raises:
        ValueError: A file that is no result, or a README file without the markers.
    """
    for path in paths or committed("full.json"):
        record = Record.read(path)
        page = report.page(record)
        print(page)
        print(*record.write(path.parent, page), *report.draw(record, path.parent), sep="\n")
    overview()
    for name in PAGES:
        file = ROOT / name
        file.write_text(rendered(file.read_text(), name))
        print(file)
    return 0


def committed(name: str) -> list[Path]:
    """This result of every device that has it."""
    return sorted(RESULTS.glob(f"*/{name}"))


def rendered(text: str, page: str) -> str:
    """The text with every part of a page of :data:`PAGES` as the committed results have it.

    Raises:
        ValueError: The markers of a part are not there, once each.
    """
    for name, part in PAGES[page].items():
        text = replaced(text, name, part((ROOT / page).parent))
    return text


def replaced(text: str, name: str, new: str) -> str:
    """The text with ``new`` between the markers of a part.

    Raises:
        ValueError: The markers are not there, once each.
    """
    begin, end = (f"<!-- {name}: {edge} -->" for edge in ("begin", "end"))
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"expected {begin} and {end}, once each")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{new}\n{end}{rest.split(end)[1]}"


def overview() -> Path | None:
    """Draw the front page's picture beside the results that it shows; None without any."""
    for path in committed("mixers.json"):
        jobs = path.with_name("finetune.json")
        if jobs.exists():
            picture = path.with_name("overview.svg")
            record = json.loads(path.read_text())
            trained = table.rows_of(json.loads(jobs.read_text()))
            charts.overview(model_rows(record), trained, record["device"], picture)
            return picture
    return None


def largest(folder: Path) -> str:
    """The front page's table: of every whole model the case with the most tokens."""
    record = _first("mixers.json")
    most: dict[str, int] = {}
    for row in model_rows(record):
        most[row.model] = max(most.get(row.model, 0), row.batch * row.length)
    rows = [row for row in model_rows(record) if row.batch * row.length == most[row.model]]
    notes = "".join(f" {note}" for note in record.get("notes", ()))
    results = _link(RESULTS, folder)
    return (
        f"{models_table(rows)}\n\nForward and backward of the whole model, r = 16, 1×1 blocks, "
        f"bf16, replayed as a CUDA graph, on an {record['device']}: the frozen model on "
        f"mamba_ssm's own fast path, and multiples of its time and peak memory. *LoRA today* is "
        f"LoRA in plain PyTorch, for which that path must be off.{notes} {record['date']}; "
        f"commands and versions are with all [results]({results}/README.md)."
    )


def smallest(folder: Path) -> str:
    """The front page's jobs, of the device that has most of them."""
    del folder
    records = [json.loads(path.read_text()) for path in committed("finetune.json")]
    found = [({row.name: row for row in table.rows_of(record)}, record) for record in records]
    rows, record = max(found, key=lambda pair: len(pair[0].keys() & set(FRONT_JOBS)))
    shown = [rows[name] for name in FRONT_JOBS if name in rows]
    every = [*shown, *(row for row in rows.values() if row.method != PRODIAL)]
    text = f"Whole steps on an {record['device']}, {record['date']}"
    if len(every) > len(shown):
        text += (
            ", beside the model frozen and with PEFT's QLoRA (of 16 bits LoRA), which loses the "
            "fast path"
        )
    return f"{table.jobs_table(every)}\n\n{text}."


def _first(name: str) -> Mapping[str, Any]:
    """This result of the first device that has it."""
    record: Mapping[str, Any] = json.loads(committed(name)[0].read_text())
    return record


def costs(folder: Path) -> str:
    """What one projector and whole models cost."""
    parts: list[str] = []
    for path in committed("full.json"):
        record = Record.read(path)
        picture = path.parent / f"{record.name}-cost.png"
        if picture.exists() and not parts:
            parts.append(
                "![Forward and backward of one trained projector over the frozen one's, for "
                f"ProDiaL and its rivals, by shape]({_link(picture, folder)})"
            )
        parts.append(projectors(record))
        page = _link(path.with_suffix(".md"), folder)
        parts.append(f"Every figure, and more pictures: [`{page}`]({page}).")
    parts += [in_fp8(Record.read(path)) for path in committed("fp8-only.json")]
    parts += [learned(json.loads(path.read_text())) for path in committed("learning.json")]
    parts += [models(json.loads(path.read_text())) for path in committed("mixers.json")]
    return "\n\n".join(parts)


def fine_tuning(folder: Path) -> str:
    """What whole fine-tuning steps take."""
    del folder
    records = [json.loads(path.read_text()) for path in committed("finetune.json")]
    return "\n\n".join(
        text for record in records for text in (table.page(record), provenance(record))
    )


def methods(folder: Path) -> str:
    """What each of MambaPEFT's methods costs, in the block and with the fast path off."""
    del folder
    # The one of all methods first: "methods-2040.json" sorts before "methods.json".
    records = [json.loads(path.read_text()) for path in reversed(committed("methods*.json"))]
    return "\n\n".join(methods_of(record) for record in records)


def several_gpus(folder: Path) -> str:
    """What runs on several GPUs give beside those on one."""
    del folder
    parts = [
        (name, part)
        for path in committed("distributed.json")
        for name, part in json.loads(path.read_text())["parts"].items()
    ]
    texts = (
        (shared_tables.part_text(name, part["rows"], _devices(part)), provenance(part))
        for name, part in parts
    )
    return "\n\n".join(text for pair in texts for text in pair)


def _devices(part: Mapping[str, Any]) -> str:
    return f"{part['processes']} {part['device']}"


PAGES: Mapping[str, Mapping[str, Callable[[Path], str]]] = {
    "README.md": {"speed": largest, "memory": smallest},
    "benchmarks/results/README.md": {"benchmarks": costs},
    "prodial_kernels/training/README.md": {
        "fine-tuning": fine_tuning,
        "several-gpus": several_gpus,
    },
    "prodial_kernels/models/methods/README.md": {"methods": methods},
}
"""What is rendered: by the page, and by the name in its markers; given the folder of the page."""


def projectors(record: Record) -> str:
    """One line for each of the table's shapes; × is over the frozen layer."""
    rows = [row for row in record.rows if row.part == "table"]
    lines = []
    for ours in rows:
        if ours.rival != OURS or ours.ratio is None:
            continue
        floor, best = find(rows, rival=FLOOR, **ours.at), tables.best_rival(rows, ours.at)
        others = [find(rows, rival=name, **ours.at) for name in SHOWN]
        lines.append([
            ours.model, f"{ours.m:,}", f"{ours.k} → {ours.n}",
            number(floor.both_us if floor else None, 0), number(ours.ratio),
            f"{number(best.ratio)} ({best.rival})" if best else "–",
            *(number(row.ratio if row else None) for row in others), number(ours.memory_ratio),
        ])  # fmt: skip
    headers = [
        "projector of", "tokens", "K → N", "frozen, µs", "ProDiaL, ×", "best rival, ×",
        "PEFT LoRA, ×", "authors' code, ×", "peak memory, ×",
    ]  # fmt: skip
    environment, first = record.environment, rows[0]
    return (
        f"**One projector**, forward and backward, r = {first.r}, {first.p}×{first.p} "
        f"blocks, {first.dtype}, on an {environment['device']}: time of the frozen layer on "
        f"cuBLAS, and multiples of it. The last column is ProDiaL's.\n\n"
        f"{text_table(headers, lines)}\n\n{provenance(environment)}"
    )


def in_fp8(record: Record) -> str:
    """One line for each shape that products in fp8 are measured at."""
    lines = []
    for row in record.rows:
        if row.rival != IN_FP8 or row.ratio is None:
            continue
        floor = find(record.rows, rival=FLOOR, **row.at)
        ours = find(record.rows, rival=OURS, **row.at)
        must, _ = PROJECTOR_IN_FP8.get((row.m, row.k, row.n), (None, None))
        lines.append([
            row.model, f"{row.m:,}", f"{row.k} → {row.n}",
            number(floor.both_us if floor else None, 0), number(ours.ratio if ours else None),
            number(row.ratio), number(must), number(row.memory_ratio),
            *(f"{e:.1%}" if e else "–" for e in (row.output_error, row.unrounded_error)),
        ])  # fmt: skip
    headers = [
        "projector of", "tokens", "K → N", "frozen, µs", "in 16 bits, ×", "in fp8, ×", "must",
        "peak memory, ×", "error", "unrounded",
    ]  # fmt: skip
    return (
        f'**One projector with its products in fp8** (`compute="fp8"`), likewise, on an '
        f"{record.environment['device']}: over the frozen layer in bf16. The error is that of the "
        f"output against its definition in fp64, which rounds X and dY to fp8 too; *unrounded* "
        f"that against fp64 without the roundings.\n\n{text_table(headers, lines)}\n\n"
        f"{provenance(record.environment)}"
    )


def learned(record: Mapping[str, Any]) -> str:
    """What adapters learned on products in 16 bits and in fp8."""
    rows = [LearningRow(**values) for values in record["rows"]]
    lines, _ = summary(rows)
    steps = max((row.held_out[-1][0] for row in rows if row.held_out), default=0)
    cosines = [value for row in rows for _, value in row.cosine]
    return (
        f"**Learning with products in fp8**: {steps:,} steps of the embedded model on a text that "
        f"it was not trained on, r = 16, bf16, nats a token on held-out text, mean and standard "
        f"deviation over seeds, on an {record['device']}.\n\n"
        + "\n".join(f"* {line}" for line in lines)
        + (
            f"\n\nCosine of the gradient with that without the roundings, over the run: "
            f"{min(cosines):.4f} to {max(cosines):.4f}." if cosines else ""
        )
        + f"\n\n{provenance(record)}"
    )  # fmt: skip


def models(record: Mapping[str, Any]) -> str:
    """One line for each whole model; × is over the frozen model on its own fast path."""
    notes = "".join(f" {note}" for note in record.get("notes", ()))
    if record.get("dropped"):
        notes += f" Dropped, as the time was over: {'; '.join(record['dropped'])}."
    return (
        f"**A whole model**, both projectors adapted with r = 16 and 1×1 blocks, forward and "
        f"backward of mamba_ssm's `MambaLMHeadModel` backbone, CUDA-graph replay, on an "
        f"{record['device']}: the same model frozen on mamba_ssm's own fast path, and multiples "
        f"of its time and peak memory.{notes}\n\n"
        f"{models_table(model_rows(record))}\n\n{provenance(record)}"
    )


def model_rows(record: Mapping[str, Any]) -> list[ModelRow]:
    """The rows of a ``mixers.json``."""
    return [ModelRow(**values) for values in record["rows"]]


def models_table(rows: Sequence[ModelRow]) -> str:
    """The lines of :func:`models`; variants that none of the rows has get no column."""
    shapes: dict[tuple[str, int, int], dict[str, ModelRow]] = {}
    for row in rows:
        if row.status == "ok":
            shapes.setdefault(row.case, {})[row.variant] = row
    variants = [
        name
        for name in ("recompute", "lora-slow", "authors")
        if any(name in found for found in shapes.values())
    ]
    lines = []
    for (model, batch, length), found in shapes.items():
        floor, ours = found.get("frozen"), found.get("prodial")
        if floor is None or ours is None:
            continue
        lines.append([
            model, f"{batch} × {length}", f"{floor.ms:.1f} ms, {floor.mib:,.0f} MiB",
            _ratios(ours), *(_ratios(found.get(name)) for name in variants),
        ])  # fmt: skip
    titles = {
        "recompute": "less memory", "lora-slow": "LoRA today", "authors": "authors' code",
    }  # fmt: skip
    headers = [
        "model", "batch × length", "frozen", "ProDiaL, time, memory",
        *(titles[name] for name in variants),
    ]  # fmt: skip
    return text_table(headers, lines)


def methods_of(record: Mapping[str, Any]) -> str:
    """One line for each method of a ``methods.json``; × is over the frozen model's."""
    rows = {row.variant: row for row in model_rows(record)}
    floor = rows["frozen"]
    lines = [
        [f"`{name}`", _ratios(row), _ratios(rows.get(f"{name}{SLOW}"))]
        for name, row in rows.items()
        if name != "frozen" and not name.endswith(SLOW)
    ]
    headers = ["method", "time, memory", "with the fast path off"]
    return (
        f"{floor.model}, {floor.batch} × {floor.length:,} tokens, frozen {floor.ms:.1f} ms and "
        f"{floor.mib:,.0f} MiB on an {record['device']}; multiples of both:\n\n"
        f"{text_table(headers, lines)}\n\n{provenance(record)}"
    )


def provenance(environment: Mapping[str, Any]) -> str:
    """Where a table comes from, as one line."""
    shown = ("torch", "triton", "mamba-ssm", "peft", "liger-kernel")
    versions = ", ".join(
        f"{name} {environment['versions'][name]}"
        for name in shown
        if environment["versions"].get(name)
    )
    return f"`{environment['command']}`, {versions}, {environment['date']}."


def _ratios(row: ModelRow | None) -> str:
    return f"{row.time_ratio:.2f}, {row.memory_ratio:.2f}" if row else "–"


def _link(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


if __name__ == "__main__":
    sys.exit(render([]))
