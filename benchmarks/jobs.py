"""What one run consists of: jobs in the order of their importance, each for one process."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from benchmarks.harness.task import Prepared
from benchmarks.models.modules import (
    METHODS,
    ModuleCase,
    ModuleRow,
    layer_cases,
    module_cases,
    prepare_modules,
)
from benchmarks.projector.breakdown import prepare_breakdown
from benchmarks.projector.cases import (
    GROUPS,
    TABLE_SHAPES,
    TINY,
    Case,
    model_cases,
    variants_of,
)
from benchmarks.projector.measure import BARE, FULL, QUICK, Settings, prepare_case
from benchmarks.projector.measure import TINY as TINY_SETTINGS
from benchmarks.projector.rivals import FLOOR, OURS, RIVALS, select
from benchmarks.projector.rows import ProjectorRow
from benchmarks.projector.scaling import RIVAL, SWEEPS, TINY_SWEEPS

# In the order in which they are measured, and from the end of which they are dropped.
PARTS = ("table", "variants", "scaling", "step", "mixer", "breakdown")
LEVELS = ("projector", "mixer", "step")
Sweeps = Mapping[str, tuple[Case, ...]]


@dataclass(frozen=True)
class Job:
    """One case and what is measured on it.

    Attributes:
        part: One of :data:`PARTS`.
        rivals: Names of rivals, or of training methods for a step or a mixer.
        settings: How much; of a step or a mixer only the rounds.
    """

    part: str
    case: Case | ModuleCase
    rivals: tuple[str, ...]
    settings: Settings = FULL

    def __str__(self) -> str:
        return f"{self.part} {self.case}"

    @property
    def seconds(self) -> float:
        """About how long measuring it takes, once prepared."""
        if isinstance(self.case, ModuleCase):
            return 5.0
        return 2.0 if self.part == "breakdown" else 0.2 + 0.25 * len(self.rivals)

    @property
    def bytes(self) -> int:
        """About how much of the device's memory it holds while others are prepared."""
        return self.case.bytes

    def prepare(self, device: str, alone: AbstractContextManager[object]) -> Prepared:
        """Do all that a busy device may do."""
        if isinstance(self.case, ModuleCase):
            return prepare_modules(self.case, self.rivals, device, self.settings.rounds)
        if self.part == "breakdown":
            return prepare_breakdown(self.case, device)
        chosen = tuple(rival for rival in RIVALS if rival.name in self.rivals)
        return prepare_case(self.case, chosen, device, self.settings, alone)

    def rows(self, status: str) -> list[ProjectorRow] | list[ModuleRow]:
        """A row for each rival that says why there are no figures."""
        if isinstance(self.case, ModuleCase):
            return [ModuleRow.of(self.case, name, status) for name in self.rivals]
        return [ProjectorRow.of(self.case, name, status) for name in self.rivals]


@dataclass(frozen=True)
class Wanted:
    """What the command asks for.

    Attributes:
        level: One of :data:`LEVELS`; None for all of them.
        model: Shapes of one model instead of the table's.
        group: One of ``cases.GROUPS`` instead; of a model or a group there are no sweeps, and of
            a group no variants, mixers or steps.
        only: Names of rivals or methods.
        scaling: Only the sweeps.
    """

    level: str | None = None
    model: str | None = None
    group: str | None = None
    only: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    quick: bool = False
    scaling: bool = False
    tiny: bool = False

    def cases(self) -> list[Case]:
        """The projectors of the table."""
        if self.tiny:
            return [*TINY]
        shapes = model_cases(self.model) if self.model else TABLE_SHAPES
        if self.group:
            shapes = GROUPS[self.group]
        return [replace(case, dtype=self.dtype) for case in shapes]

    def variants(self) -> list[Case]:
        """Variants of them, with only ProDiaL and the floor."""
        if self.tiny:
            return [replace(TINY[0], p=12)]
        if self.group:
            return []
        return [variant for case in self.cases() for variant in variants_of(case)]

    def sweeps(self) -> Sweeps:
        """The sweeps of the projector among the jobs; empty where there are none."""
        if self.level in ("mixer", "step") or self.quick:
            return {}
        if (self.model or self.group) and not self.scaling:
            return {}
        if self.tiny:
            return TINY_SWEEPS
        return {
            size: tuple(replace(case, dtype=self.dtype) for case in cases)
            for size, cases in SWEEPS.items()
        }


def plan(wanted: Wanted) -> list[Job]:
    """Return the jobs, the most important first.

    Raises:
        ValueError: An unknown rival, method or model, or a combination that has no cases.
    """
    jobs: list[Job] = []
    if wanted.level in (None, "projector"):
        jobs += _projectors(wanted)
    if wanted.level is not None and wanted.level != "projector":
        jobs += _modules(wanted, wanted.level)
    elif wanted.level is None and not (wanted.quick or wanted.model or wanted.group or wanted.only):
        jobs += _modules(wanted, "step")
        if not wanted.scaling:
            jobs += _modules(wanted, "mixer")
    return sorted(jobs, key=lambda job: PARTS.index(job.part))


def _projectors(wanted: Wanted) -> list[Job]:
    chosen = tuple(rival.name for rival in select(wanted.only, strong=wanted.quick))
    alone = tuple(name for name in chosen if name in (FLOOR, OURS))
    swept_by = tuple(rival.name for rival in select(wanted.only or (OURS, RIVAL)))
    bare, full = BARE, QUICK if wanted.quick else FULL
    if wanted.tiny:
        full, bare = TINY_SETTINGS, replace(TINY_SETTINGS, forward=False, eager=False)
    cases, variants = wanted.cases(), wanted.variants()
    jobs: list[Job] = []
    if not wanted.scaling:
        jobs += [Job("table", case, chosen, full) for case in cases]
        jobs += [Job("variants", case, alone, bare) for case in variants if OURS in alone]
    measured = {case.key for case in (*cases, *variants) if not wanted.scaling}
    swept = {case.key: case for sweep in wanted.sweeps().values() for case in sweep}
    jobs += [Job("scaling", swept[key], swept_by, bare) for key in swept if key not in measured]
    if OURS in chosen and not (wanted.scaling or wanted.quick):
        jobs += [Job("breakdown", case, (FLOOR, OURS)) for case in cases]
    return jobs


def _modules(wanted: Wanted, level: str) -> list[Job]:
    unknown = [name for name in wanted.only if name not in METHODS]
    if unknown:
        raise ValueError(f"only: expected some of {', '.join(METHODS)}; got {unknown[0]}")
    methods = ("frozen", *(name for name in wanted.only or METHODS if name != "frozen"))
    rounds = 2 if wanted.tiny else 5 if wanted.quick else 15
    settings = replace(FULL, rounds=rounds)
    both = wanted.level is None
    cases = module_cases(level, wanted.model, several=not (both or wanted.quick))
    if wanted.scaling:
        cases = []
    jobs = [Job(level, case, methods, settings) for case in cases]
    if wanted.scaling or (both and level == "step"):
        some = methods if wanted.only else ("frozen", "prodial")
        known = {replace(case, layers=case.depth) for case in cases}
        more = [case for case in layer_cases(level, wanted.model) if case not in known]
        jobs += [Job(level, case, some, settings) for case in more]
    if wanted.tiny:
        jobs = [replace(job, case=job.case.tiny()) for job in jobs]  # type: ignore[union-attr]
        jobs = list(dict.fromkeys(jobs))
    return jobs
