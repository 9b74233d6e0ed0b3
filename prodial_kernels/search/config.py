"""``SearchConfig``: the options of a search, beside those of the runs that it makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prodial_kernels.training.config import ADAPTER_OPTIONS, ConfigError, FinetuneConfig
from prodial_kernels.training.config import OPTIONS as RUN_OPTIONS
from prodial_kernels.training.options import checked_value, option, options_of

DEFAULT_STEPS = 30
SEARCH_OUTPUT = "prodial-search"
CHOSEN_BY_SEARCH = frozenset(
    {*ADAPTER_OPTIONS, "method", "methods", "preset", "init_adapter"}
    - {"target_modules", "allow_partial", "compute"}
)
"""Options of a run that a search chooses itself."""
WITHOUT_MEANING = frozenset(
    {"eval_every", "save_every", "log_every", "keep", "report_to", "shard", "epochs"}
)
"""Options of a run that nothing would be done with in a trial."""
SHARED_OPTIONS = tuple(
    name for name in RUN_OPTIONS if name not in CHOSEN_BY_SEARCH | WITHOUT_MEANING
)
"""Options of a run that hold for all trials of a search."""


@dataclass(frozen=True)
class SearchOptions:
    """The options of a search that a run does not have."""

    trials: int = option(
        40, "runs in all ({default}): first every method by itself, then of what is left one half "
        "to choose methods, one half to choose sizes", metavar="N", range=(1, 10**6),
    )  # fmt: skip
    among: tuple[str, ...] | None = option(
        None, "what may be switched on ({default})", metavar="NAME", shown="all that the model has"
    )
    max_trainable: int | None = option(
        None, "most trained parameters of a combination ({default})", metavar="N",
        range=(1, 2**50), unit=True, shown="any number",
    )  # fmt: skip
    refine: int = option(
        3, "how many of the best combinations get their sizes searched ({default})", metavar="N",
        range=(1, 1000),
    )  # fmt: skip
    evaluations: int = option(
        3, "evaluations in a trial ({default}); one that falls behind the median is ended at one",
        metavar="N", range=(1, 1000),
    )  # fmt: skip
    workers: int = option(
        1, "processes that run trials at the same time ({default})", metavar="N", range=(1, 1024)
    )

    def __post_init__(self) -> None:
        for name, each in OPTIONS.items():
            required = "None" not in each.type
            checked = checked_value(each, getattr(self, name), required=required)
            object.__setattr__(self, name, checked)


OPTIONS = options_of(SearchOptions, {})
"""Every option of a search by name."""


@dataclass(frozen=True)
class SearchConfig(SearchOptions):
    """What to search, and the runs to search with.

    Attributes:
        run: What all trials have in common: model, data, sizes of batches, steps (30 where they
            are not given), where the search is kept (``output``), the learning rate and the weight
            decay around which values are tried. What the search chooses must be left open.
        trials: As in :class:`SearchOptions`, like what follows.
        among: Names of :mod:`prodial_kernels.search.parts`.

    Raises:
        ConfigError: An option out of range, or one that the search chooses itself.
    """

    run: FinetuneConfig = field(default_factory=FinetuneConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.run, FinetuneConfig):
            raise ConfigError(f"`run` must be a FinetuneConfig, got {self.run!r:.60}")
        plain = FinetuneConfig()
        given = [n for n in RUN_OPTIONS if getattr(self.run, n) != getattr(plain, n)]
        chosen = [f"`{name}`" for name in given if name in CHOSEN_BY_SEARCH]
        if chosen:
            raise ConfigError(
                f"{', '.join(chosen)}: a search chooses methods and their sizes itself; leave "
                "them out, or say with `among` what may be switched on"
            )
        idle = [f"`{name}`" for name in given if name in WITHOUT_MEANING]
        if idle:
            raise ConfigError(f"{', '.join(idle)} would have no effect in a search; leave it out")
        if self.run.quantize == "auto":
            raise ConfigError(
                "`quantize` 'auto' depends on what is trained, and a search compares on one base: "
                "name a format, such as 'nf4'"
            )

    @property
    def steps(self) -> int:
        """Optimiser steps of a trial."""
        return DEFAULT_STEPS if self.run.steps is None else self.run.steps

    def to_dict(self) -> dict[str, Any]:
        """Return all options as plain JSON-ready values."""
        own = {name: getattr(self, name) for name in OPTIONS}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in own.items()}
        return {**plain, "run": self.run.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SearchConfig:
        """Build a configuration from plain values; those of a run may stand beside the others.

        Raises:
            ConfigError: Unknown keys, or values out of range.
        """
        own = {name: value for name, value in values.items() if name in OPTIONS}
        run = dict(values.get("run", {}))
        run |= {n: v for n, v in values.items() if n not in OPTIONS and n != "run"}
        return cls(run=FinetuneConfig.from_dict(run), **own)
