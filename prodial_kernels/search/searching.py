"""``search``: the whole of it, from options to a report and a configuration to train with.

result = search(SearchConfig(run=FinetuneConfig(model="path/to/mamba", data="notes.txt")))
print(result)
"""

from __future__ import annotations

import json
import warnings
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from prodial_kernels.files.atomic import atomic_file, atomic_text
from prodial_kernels.files.locking import locked
from prodial_kernels.search.config import SearchConfig
from prodial_kernels.search.directory import SearchDirectory
from prodial_kernels.search.parts import PARTS, Part, Space, check_among
from prodial_kernels.search.picture import plot_search
from prodial_kernels.search.processes import OtherWorkers
from prodial_kernels.search.record import ranked
from prodial_kernels.search.result import SearchResult
from prodial_kernels.search.studies import open_storage
from prodial_kernels.search.trials import Trials
from prodial_kernels.search.work import Work
from prodial_kernels.training.config import ConfigError, FinetuneConfig
from prodial_kernels.training.run.progress import Progress
from prodial_kernels.training.run.signals import StopSignals
from prodial_kernels.upstream import require_extra


def search(config: SearchConfig, *, resume: bool = False, progress: bool = True) -> SearchResult:
    """Search for the combination of methods, and their sizes, that trains best.

    Step one tries every part by itself, then combinations at default sizes; step two varies the
    sizes of the best ones. Every trial is a run of ``config.run`` on the same model, in this
    process, evaluated on the held-out data. The directory ``config.run.output`` gets
    ``search.json`` (what this search is), ``trials.sqlite``, ``report.md``, ``results.json``,
    ``search.png`` and ``best.json``, which ``prodial finetune --config`` takes.

    Args:
        config: What to search.
        resume: Continue the search in ``config.run.output``, or work on it beside other processes.
            More ``trials`` than before make it longer.
        progress: Show progress on stderr.

    Returns:
        What came out; prints as a table.

    Raises:
        MissingExtraError: optuna, or what ``finetune`` needs, is not installed.
        ConfigError: An option that cannot be used, or a part that the model does not take.
        SearchError: The directory holds something already or, with ``resume``, another search or
            none; or no trial comes to its end.
        Interrupted: Ctrl-C, SIGTERM or the like: what was done is kept.
        Exception: What :func:`~prodial_kernels.training.finetune` raises for such a model and
            data. Of a single trial it is only recorded.
    """
    require_extra("prodial search")
    require_extra("prodial search", ("optuna",), extra="search")
    folder = SearchDirectory(config.run.output)
    config = replace(config, run=_with_whole_paths(config.run))
    if resume:
        saved = folder.read()
        folder.check_same(saved, config)
    else:
        folder.check_startable()
    base = replace(
        config.run, steps=config.steps, eval_every=-(-config.steps // config.evaluations),
        save_every=0,
    )  # fmt: skip
    names = tuple(PARTS) if config.among is None else check_among(config.among)
    display = Progress(enabled=progress)
    with StopSignals() as signals:
        trials = Trials(base, folder.path, display, signals)
        parts, unsuited = _suited(config, base, names, trials)
        space = Space(base, parts)
        if config.trials <= len(parts):
            raise ConfigError(
                f"`trials` {config.trials} are not enough: each of {len(parts)} parts is tried by "
                f"itself first ({', '.join(p.name for p in parts)}); give more, or name fewer with "
                "`among`"
            )
        if not resume:
            folder.begin(config)
        elif config.trials != saved.trials:
            folder.write(replace(config, workers=saved.workers))
        with ExitStack() as stack:
            worker = stack.enter_context(folder.worker())
            storage = open_storage(folder.database)
            stack.callback(storage.remove_session)

            def result() -> SearchResult:
                return SearchResult(
                    trials.before, work.records, config.trials, [part.name for part in parts],
                    unsuited, config.max_trainable, folder.path,
                )  # fmt: skip

            def write() -> None:
                with locked(folder.path, wait=60.0):
                    _write(result(), config.run, folder)

            work = Work(
                config, space, trials, folder, storage, worker=worker, display=display, tell=write
            )
            with OtherWorkers(folder, config.workers - 1, say=display.say):
                work.run()
            write()
            found = result()
        if ranked(found.records):
            with atomic_file(folder.plot_file) as picture:
                plot_search(found, picture)
    return found


def _with_whole_paths(run: FinetuneConfig) -> FinetuneConfig:
    whole = run.resolved()
    return replace(run, model=whole.model, data=whole.data, held_out=whole.held_out)


def _suited(
    config: SearchConfig, base: FinetuneConfig, names: tuple[str, ...], trials: Trials
) -> tuple[tuple[Part, ...], dict[str, str]]:
    """Return the parts that the model takes, each at sizes within the limit, and why others not.

    ConfigError for one that was asked for, or where fewer than two are left.
    """
    parts, unsuited = [], {}
    for name in names:
        try:
            part = _within(PARTS[name], config, base, trials)
        except ValueError as error:
            if config.among is not None:
                raise ConfigError(f"`among` {name}: {error}") from error
            unsuited[name] = str(error)
        else:
            parts.append(part)
    if len(parts) < 2:
        why = "".join(f"; {name}: {reason}" for name, reason in unsuited.items())
        raise ConfigError(f"`among`: fewer than two parts can be combined in this model{why}")
    return tuple(parts), unsuited


def _within(part: Part, config: SearchConfig, base: FinetuneConfig, trials: Trials) -> Part:
    """Return a part with the sizes that the model and the limit let it have.

    ValueError where it does not fit the model, or not into the limit.
    """
    most = config.max_trainable

    def size(part: Part) -> int:
        space = Space(base, (part,))
        return trials.trainable(space.run((part.name,), space.defaults((part.name,))))

    def too_large(part: Part) -> bool:
        with warnings.catch_warnings():
            # A rank that is no less than a side of a layer is warned of.
            warnings.simplefilter("error", UserWarning)
            try:
                found = size(part)
            except (ValueError, UserWarning):
                return True
        return most is not None and found > most

    for knob in [knob for knob in part.knobs if knob.powers]:
        low, high = knob.range
        while high > low and too_large(part.with_default(knob.name, int(high))):
            high /= 2
        part = part.with_range(knob.name, (low, high))
    found = size(part)
    if most is not None and found > most:
        raise ValueError(f"it trains at least {found:,} parameters, over max_trainable={most:,}")
    return part


def _write(result: SearchResult, run: FinetuneConfig, folder: SearchDirectory) -> None:
    atomic_text(folder.results_file, json.dumps(result.to_dict(), indent=2) + "\n")
    atomic_text(folder.report_file, result.to_markdown())
    if result.best is not None:
        options = {**_given(run), **result.best.options}
        options = {name: value for name, value in options.items() if value is not None}
        atomic_text(folder.best_file, json.dumps(options, indent=2) + "\n")


def _given(run: FinetuneConfig) -> dict[str, Any]:
    """Return the options of a run that are not the defaults, but for those of one trial."""
    plain = FinetuneConfig().to_dict()
    return {
        name: value
        for name, value in run.to_dict().items()
        if value != plain[name] and name not in ("output", "steps")
    }
