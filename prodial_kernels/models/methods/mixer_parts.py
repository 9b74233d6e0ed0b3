"""Which rows of a mixer's projections are which part, and what a mixer's scan consists of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from prodial_kernels.models.placements import is_mixer
from prodial_kernels.module_tree import module_paths


@dataclass(frozen=True)
class Rows:
    """Output rows of one projection of a mixer.

    Attributes:
        child: The projection's name in the mixer.
        start: The first row.
        stop: The row behind the last.
    """

    child: str
    start: int
    stop: int


@dataclass(frozen=True)
class ScanParts:
    """The parts of one selective scan of a Mamba-1 mixer, by their names in it.

    Attributes:
        A_log: Its logarithm of -A, [E, N].
        x_proj: The projection [dt_rank + 2N, E].
        states: N.
        dt_rank: Rows of ``x_proj`` for the step size.
    """

    A_log: str
    x_proj: str
    states: int
    dt_rank: int


_SCANS = (("A_log", "x_proj"), ("A_b_log", "x_proj_b"))


def mixers_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield every mixer of ``model`` with its first path."""
    for module, paths in {model: ("",), **module_paths(model)}.items():
        if is_mixer(module):
            yield paths[0], module


def scans_of(mixer: nn.Module) -> list[ScanParts]:
    """Return the selective scans of a Mamba-1 mixer, two of one that scans both ways; else []."""
    found = []
    for a_name, x_name in _SCANS:
        a, projection = mixer._parameters.get(a_name), mixer._modules.get(x_name)
        if a is not None and a.ndim == 2 and projection is not None:
            states, rows = a.shape[1], int(getattr(projection, "out_features", 0))
            if rows > 2 * states:
                found.append(ScanParts(a_name, x_name, states, rows - 2 * states))
    return found


def rows_of(mixer: nn.Module, part: str) -> list[Rows]:
    """Return where a part ("X", "Z", "d", "B", "C") is in a mixer; [] where it has none."""
    scans = scans_of(mixer)
    projector: Any = mixer._modules.get("in_proj")
    if scans and part in ("X", "Z"):
        width = 0 if projector is None else int(projector.out_features)
        half = width // 2
        if width != 2 * next(iter(mixer._parameters[s.A_log].shape[0] for s in scans)):  # type: ignore[union-attr]
            return []
        return [Rows("in_proj", 0, half) if part == "X" else Rows("in_proj", half, width)]
    if scans:
        return [_of_scan(scan, part) for scan in scans]
    return _of_mamba2(mixer, part, projector)


def _of_scan(scan: ScanParts, part: str) -> Rows:
    bounds = (0, scan.dt_rank, scan.dt_rank + scan.states, scan.dt_rank + 2 * scan.states)
    place = ("d", "B", "C").index(part)
    return Rows(scan.x_proj, bounds[place], bounds[place + 1])


def _of_mamba2(mixer: Any, part: str, projector: Any) -> list[Rows]:
    """In one in_proj: z, x, B, C, dt. Those with an MLP inside it have other rows."""
    output = mixer._modules.get("out_proj")
    own = mixer._parameters.get("dt_bias")
    if projector is None or output is None or own is None:
        return []
    inner, heads = int(output.in_features), int(own.shape[0])
    rest = int(projector.out_features) - 2 * inner - heads
    states = getattr(mixer, "ssm_state_size", getattr(mixer, "d_state", None))
    groups = getattr(mixer, "n_groups", getattr(mixer, "ngroups", None))
    if not isinstance(states, int) or not isinstance(groups, int) or rest != 2 * groups * states:
        return []
    sizes = {"Z": inner, "X": inner, "B": rest // 2, "C": rest // 2, "d": heads}
    start = 0
    for name, size in sizes.items():
        if name == part:
            return [Rows("in_proj", start, start + size)]
        start += size
    return []
