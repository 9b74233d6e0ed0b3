"""Learned tokens between ``in_proj`` and the convolution: the scan reads them, nobody sees them.

A mixer that holds such tokens (``AFFIX``) runs on a longer sequence: the input gets placeholders
where the tokens go, ``in_proj`` runs over all of it, its output at the placeholders is overwritten
by the tokens, and what comes out there is dropped. So every path of every mixer stays what it is,
with a few tokens more; what is copied is the mixer's input, a quarter of what ``in_proj`` returns.

Where tokens may stand behind the last one that counts, they have no effect on it: a direction's
scan ends there. So both directions of Vim share one sequence, with the tokens that each reads first
at the end where it begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AFFIX = "prodial_affix"
"""Attribute of a mixer: the tokens it inserts, an :class:`InsertedTokens`."""

POSITIONS = ("prefix", "suffix", "infix")

# Sequences of such lengths are read and written channel-first (``ops/layout.py``), and fast by the
# convolution's kernels.
_MULTIPLE = 8


class InsertedTokens(Protocol):
    """What a mixer holds.

    Attributes:
        count: k, tokens of one direction.
        position: One of :data:`POSITIONS`.
        shared: Whether both directions read the same tokens.
    """

    count: int
    position: str
    shared: bool

    def enabled(self, mixer: Any) -> bool:
        """Whether they are inserted now."""

    def columns(self, mixer: Any, direction: int) -> Tensor:
        """Return a direction's tokens, [features of in_proj, k].

        In the order in which that direction reads them; of an infix, in that of the sequence.
        """


class Layout(NamedTuple):
    """Where a sequence and its tokens lie in the longer one.

    Attributes:
        total: Length of the longer sequence.
        pieces: (first, length) of the sequence's pieces in it, in order.
        runs: For each direction, (first, length) of its tokens, in the order of the sequence.
    """

    total: int
    pieces: tuple[tuple[int, int], ...]
    runs: tuple[tuple[tuple[int, int], ...], ...]

    def lengthened(self, x: Tensor) -> Tensor:
        """[b, l, ...] -> [b, total, ...], 0 at the places of tokens; differentiable."""
        lengths = [length for _, length in self.pieces]
        ends = [first + length for first, length in self.pieces]
        starts = [*(first for first, _ in self.pieces[1:]), self.total]
        rest = (0, 0) * (x.ndim - 2)
        before = self.pieces[0][0]
        if len(self.pieces) == 1:
            return F.pad(x, (*rest, before, self.total - ends[0]))
        padded = [
            F.pad(part, (*rest, before if i == 0 else 0, starts[i] - ends[i]))
            for i, part in enumerate(x.split(lengths, dim=1))
        ]
        return torch.cat(padded, dim=1)

    def shortened(self, y: Tensor) -> Tensor:
        """[b, total, ...] -> [b, l, ...] without the tokens: a view where it is one piece."""
        parts = [y.narrow(1, first, length) for first, length in self.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def placed(self, xz: Tensor, columns: Tensor) -> Tensor:
        """Put ``columns`` [features, k] of the first direction into xz [b, features, total]."""
        return overwritten(xz, columns, self.runs[0])


class PaddedLayout(NamedTuple):
    """A prefix between padding and text: of each row its own place.

    Attributes:
        padding: [b], how many of a row's first places are padding.
        tokens: k.
        length: l, of the sequence without them, padding included.
    """

    padding: Tensor
    tokens: int
    length: int

    def lengthened(self, x: Tensor) -> Tensor:
        """[b, l, ...] -> [b, l + k, ...], 0 at the places of tokens; differentiable."""
        place, inserted = self._places()
        source = torch.where(place < self.padding[:, None], place, place - self.tokens)
        taken = _rows(x, source.clamp(0, self.length - 1))
        return taken.masked_fill(_like(inserted, taken), 0)

    def shortened(self, y: Tensor) -> Tensor:
        """[b, l + k, ...] -> [b, l, ...] without the tokens."""
        place = torch.arange(self.length, device=y.device)[None]
        return _rows(y, place + self.tokens * (place >= self.padding[:, None]))

    def placed(self, xz: Tensor, columns: Tensor) -> Tensor:
        """Put ``columns`` [features, k] into xz [b, features, l + k] at their places."""
        place, inserted = self._places()
        number = (place - self.padding[:, None]).clamp(0, self.tokens - 1)
        spread = columns.to(xz.dtype).mT[number].mT
        return torch.where(inserted[:, None], spread, xz)

    def _places(self) -> tuple[Tensor, Tensor]:
        """Return the places [1, l + k], and [b, l + k] where tokens stand."""
        first = self.padding[:, None]
        place = torch.arange(self.length + self.tokens, device=first.device)[None]
        return place, (place >= first) & (place < first + self.tokens)


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """X [b, l, ...] at ``places`` [b, m]: [b, m, ...]."""
    return x.gather(1, _like(places, x).expand(-1, -1, *x.shape[2:]))


def _like(flags: Tensor, x: Tensor) -> Tensor:
    return flags.view(*flags.shape, *[1] * (x.ndim - 2))


def behind_padding(longer: Layout, mask: Tensor, position: str = "prefix") -> Layout | PaddedLayout:
    """Return a layout whose tokens stand behind a row's padding on the left.

    Args:
        longer: Without padding.
        mask: [b, l], 0 where there is padding. Looking at it waits for the device.
        position: Of the tokens.

    Raises:
        ValueError: Padding on the left of a sequence with tokens in its middle.
    """
    if bool(mask[:, 0].all()):
        return longer
    if position == "infix":
        raise ValueError(
            "position='infix' with padding on the left, which moves the middle of every text; pad "
            "on the right"
        )
    padding = (mask.cumsum(1) == 0).sum(1)
    first, length = longer.pieces[0]
    return PaddedLayout(padding, first, length)


def lengthened_mask(longer: Layout | PaddedLayout, mask: Tensor) -> Tensor:
    """Return a mask of padding, 1 where there is none, for the longer sequence."""
    return (1 - longer.lengthened((mask == 0).to(torch.int64))).to(mask.dtype)


def inserted_tokens(mixer: Any) -> Any:
    """Return the :class:`InsertedTokens` of a mixer, if it inserts any now."""
    tokens = getattr(mixer, AFFIX, None)
    return tokens if tokens is not None and tokens.enabled(mixer) else None


def reads_from_outside(block: nn.Module) -> bool:
    """Whether a mixer in ``block`` gets its tokens from a network that is not in ``block``."""
    found = (getattr(module, AFFIX, None) for module in block.modules())
    return any(getattr(tokens, "of_model", None) is not None for tokens in found)


def layout(
    length: int, tokens: InsertedTokens, *, directions: int = 1, rounded: bool = False
) -> Layout:
    """Say where ``tokens`` go in a sequence.

    Args:
        length: l, of the sequence without them.
        tokens: How many, and where.
        directions: 1 for a causal mixer, 2 for one that also scans backwards.
        rounded: Whether what is behind the sequence may be longer than the tokens there; of a
            causal mixer without a cache it may.

    Raises:
        ValueError: Tokens behind the sequence of a causal mixer, which would read them too late.
    """
    k = tokens.count
    if tokens.position == "infix":
        # As even as can be: k + 1 pieces, the longer ones first.
        small, longer = divmod(length, k + 1)
        pieces, runs, at = [], [], 0
        for i in range(k + 1):
            size = small + (i < longer)
            pieces.append((at, size))
            at += size
            if i < k:
                runs.append((at, 1))
                at += 1
        total = _rounded(at, rounded and directions == 1)
        return Layout(total, tuple(pieces), (tuple(runs),) * directions)
    if tokens.position == "suffix":
        if directions == 1:
            raise ValueError(
                "position='suffix': a causal mixer reads these tokens after the last one that "
                "counts, so they would have no effect; use 'prefix' or 'infix'"
            )
        return Layout(length + k, ((0, length),), ((), ((length, k),)))
    if directions == 1:
        return Layout(_rounded(k + length, rounded), ((k, length),), (((0, k),),))
    return Layout(length + 2 * k, ((k, length),), (((0, k),), ((k + length, k),)))


def _rounded(total: int, wanted: bool) -> int:
    return -(-total // _MULTIPLE) * _MULTIPLE if wanted else total


def in_sequence(mixer: Any, tokens: InsertedTokens, direction: int) -> Tensor:
    """Return a direction's tokens [features, k] in the order of the sequence."""
    columns = tokens.columns(mixer, direction)
    backwards = direction == 1 and tokens.position != "infix"
    return columns.flip(-1) if backwards else columns


def overwritten(xz: Tensor, columns: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    """Put ``columns`` [features, k] into xz [b, features, total] at ``runs``; differentiable."""
    if not runs:
        return xz
    parts, at, taken = [], 0, 0
    spread = columns.to(xz.dtype).expand(xz.shape[0], -1, -1)
    for first, length in runs:
        parts += [xz[..., at:first], spread[..., taken : taken + length]]
        at, taken = first + length, taken + length
    return torch.cat([*parts, xz[..., at:]], dim=-1)


def with_tokens(mixer: Any, tokens: InsertedTokens, xz: Tensor, longer: Layout) -> list[Tensor]:
    """Return what each direction reads of xz [b, features, total], its tokens put into it.

    That is one tensor for all where their tokens lie apart, or are the same.
    """
    runs = longer.runs
    same_places = len({*runs}) < len(runs)
    if same_places and tokens.shared:
        return [overwritten(xz, in_sequence(mixer, tokens, 0), runs[0])] * len(runs)
    given = []
    for direction, places in enumerate(runs):
        written = overwritten(xz, in_sequence(mixer, tokens, direction), places)
        if same_places:
            given.append(written)
        else:
            xz = written
    return given if same_places else [xz] * len(runs)


def write(xz: Tensor, columns: Tensor, runs: Sequence[tuple[int, int]]) -> None:
    """The same in place."""
    taken = 0
    for first, length in runs:
        xz[..., first : first + length] = columns[:, taken : taken + length]
        taken += length


def take_gradient(dxz: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    """Return the gradient of the columns, [features, k] in fp32 or wider, and set it to 0 in dxz.

    What stood there before the tokens has no gradient.
    """
    wide = torch.promote_types(torch.float32, dxz.dtype)
    parts = []
    for first, length in runs:
        part = dxz[..., first : first + length]
        parts.append(part.to(wide).sum(0))
        part.zero_()
    return torch.cat(parts, dim=-1)
