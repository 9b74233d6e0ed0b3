"""Everything that one run measured, in memory and as the results have it on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import store
from benchmarks.harness.rows import values_of
from benchmarks.models.modules import ModuleRow
from benchmarks.projector.cases import Case
from benchmarks.projector.roofline import Ceilings, add_roofline
from benchmarks.projector.rows import ProjectorRow


@dataclass
class Record:
    """A run of ``benchmarks.run``; its fields are the keys of the JSON.

    Attributes:
        name: Stem of the files.
        environment: See :func:`benchmarks.harness.environment.describe`.
        seconds: What the run spent, by what it did.
        rows: Of projectors, the breakdown's kernels added to those that they belong to.
        modules: Of mixers and whole steps.
        dropped: Names of the jobs for which there was no time.
        sweeps: The cases along each size.
        corrections: What of a committed result was measured wrong.
    """

    name: str
    environment: dict[str, Any]
    clocks_before: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    ceilings: Ceilings | None = None
    rows: list[ProjectorRow] = field(default_factory=list)
    modules: list[ModuleRow] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    sweeps: dict[str, list[Case]] = field(default_factory=dict)
    comparison: list[dict[str, Any]] | None = None
    base: str | None = None
    clocks_after: str | None = None
    corrections: Any = None

    def add(self, part: str, rows: Sequence[ProjectorRow | ModuleRow]) -> None:
        """Put a job's rows where they belong."""
        for row in rows:
            if isinstance(row, ModuleRow):
                self.modules.append(row)
            elif part == "breakdown":
                self._add_kernels(row)
            else:
                row.part = part
                if self.ceilings is not None:
                    add_roofline(row, self.ceilings)
                self.rows.append(row)

    def _add_kernels(self, row: ProjectorRow) -> None:
        """A breakdown belongs to a row that is there already."""
        for known in self.rows:
            if (known.rival, known.at) == (row.rival, row.at):
                known.kernels_us = row.kernels_us
                known.kernels_status = None if row.status == "ok" else row.status

    def write(self, folder: Path, page: str) -> list[Path]:
        """Write ``<name>.json``, ``.csv`` and ``.md``; return their paths."""
        rows = [values_of(row) for row in self.rows]
        modules = [values_of(row) for row in self.modules]
        data = {**values_of(self), "rows": rows, "modules": modules}
        data["sweeps"] = {size: [asdict(c) for c in cases] for size, cases in self.sweeps.items()}
        if self.ceilings is not None:
            data["ceilings"] = {
                "flops": self.ceilings.flops, "bandwidth": self.ceilings.bandwidth
            }  # fmt: skip
        texts = {
            ".json": store.json_text(data, indent=1),
            ".csv": store.csv_text([*rows, *modules]),
            ".md": page + "\n",
        }
        paths = [folder / f"{self.name}{suffix}" for suffix in texts]
        for path, text in zip(paths, texts.values(), strict=True):
            store.write_text(path, text)
        return paths

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read what :meth:`write` wrote.

        Raises:
            ValueError: The file is no such result.
        """
        data = json.loads(path.read_text())
        if not {"environment", "rows", "modules", "sweeps", "name"} <= data.keys():
            raise ValueError(f"{path} is not a result of benchmarks.run")
        ceilings = data.get("ceilings")
        return cls(**{
            **data,
            "ceilings": ceilings and Ceilings(**ceilings),
            "rows": [ProjectorRow(**row) for row in data["rows"]],
            "modules": [ModuleRow(**row) for row in data["modules"]],
            "sweeps": {
                size: [Case(**case) for case in cases] for size, cases in data["sweeps"].items()
            },
        })  # fmt: skip
