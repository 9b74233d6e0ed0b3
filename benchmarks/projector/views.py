"""Rows as tables that a person reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.harness.store import find
from benchmarks.projector.cases import BLOCK_SIZES, block_size
from benchmarks.projector.rivals import FLOOR, OURS

Rows = Sequence[Mapping[str, Any]]

# Ratio to the frozen layer on an H100 at P = 1, r = 16, bf16: (must, aim).
TARGETS: Mapping[tuple[int, int, int], tuple[float, float]] = {
    (2048, 768, 3072): (2.1, 1.6),
    (2048, 1536, 768): (2.3, 1.8),
    (16384, 768, 3072): (1.60, 1.35),
    (16384, 1536, 768): (1.80, 1.5),
    (8192, 2048, 8192): (1.33, 1.15),
    (8192, 4096, 2048): (1.45, 1.25),
    (16384, 2048, 8192): (1.30, 1.12),
    (16384, 4096, 2048): (1.42, 1.2),
}
VARIANT_LIMIT, MEMORY_LIMIT, HOST_LIMIT_US = 1.15, 1.10, 150.0


def text_table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns aligned, the first to the left, in Markdown's form."""
    widths = [max(len(line[i]) for line in [headers, *lines]) for i in range(len(headers))]

    def join(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = (
        "|"
        + "|".join("-" * (width + 1) + ("-" if i == 0 else ":") for i, width in enumerate(widths))
        + "|"
    )
    return "\n".join([join(headers), rule, *map(join, lines)])


def number(value: float | None, digits: int = 2) -> str:
    """A figure, or a dash for one that was not measured."""
    return "–" if value is None else f"{value:.{digits}f}"


COLUMNS: Sequence[tuple[str, Callable[[Mapping[str, Any]], str]]] = (
    ("µs", lambda row: number(row.get("both_us"), 1)),
    ("± %", lambda row: number(100 * row["spread"] / 2, 1)),
    ("× frozen", lambda row: number(row.get("ratio"))),
    ("forward µs", lambda row: number(row.get("forward_us"), 1)),
    ("eager µs", lambda row: number(row.get("eager_us"), 0)),
    ("host µs", lambda row: number(row.get("host_us"), 0)),
    ("peak MiB", lambda row: number(row.get("peak_mib"), 1)),
    ("kept MiB", lambda row: number(row.get("kept_mib"), 1)),
    ("TFLOP/s", lambda row: number(row.get("tflops"), 0)),
    ("GB/s", lambda row: number(row.get("gbps"), 0)),
    ("% roof", lambda row: number(100 * row["roofline_fraction"], 0)),
    ("error", lambda row: f"{max(row['output_error'], row['gradient_error']):.1e}"),
)


def case_view(rows: Rows) -> str:
    """Every figure of one case, a line for each rival; what was refused is said below."""
    measured = [row for row in rows if row["status"] == "ok"]
    lines = [[row["rival"], *(show(row) for _, show in COLUMNS)] for row in measured]
    head = rows[0]
    title = f"{head['m']},{head['k']},{head['n']}  P={head['p']} r={head['r']} {head['dtype']}"
    notes = [f"  {row['rival']}: {row['status']}" for row in rows if row["status"] != "ok"]
    table = [text_table(["rival", *(name for name, _ in COLUMNS)], lines)] if lines else []
    return "\n".join([f"{title}  {head['model']}".rstrip(), *table, *notes])


def list_view(rows: Rows) -> str:
    """The figures that any row has, a line for each row."""
    lines = [
        [
            f"{row['m']},{row['k']},{row['n']} P={row['p']} r={row['r']}", row["rival"],
            number(row["both_us"], 1), number(100 * row["spread"] / 2, 1),
            number(row.get("ratio")), number(row["peak_mib"], 1),
            number(100 * row["roofline_fraction"], 0),
            f"{max(row['output_error'], row['gradient_error']):.1e}",
        ]
        if row["status"] == "ok"
        else [
            f"{row['m']},{row['k']},{row['n']} P={row['p']} r={row['r']}",
            f"{row['rival']}: {row['status']}", *[""] * 6,
        ]
        for row in rows
    ]  # fmt: skip
    headers = ["case", "rival", "µs", "± %", "× frozen", "peak MiB", "% roof", "error"]
    return text_table(headers, lines)


def targets_view(rows: Rows) -> str:
    """One line for each shape: ProDiaL against its targets and the best other way to compute it."""
    lines = [_target_line(rows, shape, base) for shape, base in _base_rows(rows).items()]
    headers = [
        "M,K,N", "frozen µs", "must", "aim", "ProDiaL", "", "best rival", "",
        *(f"P={p}" for p in BLOCK_SIZES), "r ×4", "memory", "host µs",
    ]  # fmt: skip
    note = (
        "ProDiaL and the rivals: × the frozen layer, at the first P and r of each shape. "
        f"P (or the next power of two that divides K) and r ×4: × that, at most {VARIANT_LIMIT}. "
        f"Memory: peak × frozen, at most {MEMORY_LIMIT} at M = 16384. "
        f"Host: at most {HOST_LIMIT_US:.0f} µs. '!' marks what misses."
    )
    return text_table(headers, lines) + "\n" + note


def _target_line(rows: Rows, shape: tuple[int, int, int], base: Mapping[str, Any]) -> list[str]:
    m, k, n = shape
    same = {"m": m, "k": k, "n": n, "dtype": base["dtype"]}
    at = same | {"p": base["p"], "r": base["r"]}
    floor = find(rows, rival=FLOOR, **at)
    must, aim = TARGETS.get(shape, (None, None))
    ratio = base.get("ratio")
    best = best_rival(rows, at)
    verdict = ""
    if must is not None and aim is not None and ratio is not None:
        verdict = "aim" if ratio <= aim else "must" if ratio <= must else "!"
    beaten = best is None or ratio is None or ratio < best["ratio"]

    def against_base(**changed: int) -> str:
        row = find(rows, rival=OURS, **(same | changed))
        # The floor of each case was measured beside it: compare ratios, not times.
        return _limited(row["ratio"] / ratio if row and ratio else None, VARIANT_LIMIT)

    variants = [against_base(p=block_size(p, k), r=base["r"]) for p in BLOCK_SIZES]
    memory_limit = MEMORY_LIMIT if m >= 16384 else None
    return [
        f"{m},{k},{n}", number(floor["both_us"] if floor else None, 1), number(must), number(aim),
        number(ratio), verdict,
        f"{best['rival']} {number(best['ratio'])}" if best else "–", "" if beaten else "!",
        *variants, against_base(p=base["p"], r=4 * base["r"]),
        _limited(base.get("memory_ratio"), memory_limit),
        _limited(base.get("host_us"), HOST_LIMIT_US, 0),
    ]  # fmt: skip


def best_rival(rows: Rows, at: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The fastest other way to train these projectors at this case, whatever method it computes."""
    others = [
        row
        for row in rows
        if "ratio" in row and row["rival"] not in (FLOOR, OURS)
        and all(row[name] == value for name, value in at.items())
    ]  # fmt: skip
    return min(others, key=lambda row: row["both_us"], default=None)


def _base_rows(rows: Rows) -> dict[tuple[int, int, int], Mapping[str, Any]]:
    """ProDiaL's row of each of the table's shapes."""
    base: dict[tuple[int, int, int], Mapping[str, Any]] = {}
    for row in rows:
        if row["part"] == "table" and row["rival"] == OURS and row["status"] == "ok":
            base.setdefault((row["m"], row["k"], row["n"]), row)
    return base


def _limited(value: float | None, limit: float | None, digits: int = 2) -> str:
    missed = value is not None and limit is not None and value > limit
    return number(value, digits) + ("!" if missed else "")
