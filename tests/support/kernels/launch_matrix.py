"""The projectors whose launches are compiled: every way that a constant of a kernel comes out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from prodial_kernels.kernels.choices.tile_sizes import padded_rank
from prodial_kernels.kernels.projector import passes, small_passes
from prodial_kernels.kernels.projector.operands import Kept, Needs, Operands, ProjectionOptions
from prodial_kernels.ops.detours import is_small, is_thin, is_wide
from support.kernels.launch_recorder import Launch, Recorder

# Gradients: x, blocks, scale, lora_a, lora_b, bias.
ALL_NEEDS = (True,) * 6

# K, N of Mamba-130M, 370M and 1.4B, of Mamba-2 and of sizes that nothing divides.
ALIGNED = [(768, 3072), (1536, 768), (2048, 8192), (4096, 2048), (768, 3352), (1024, 4384)]
BLOCK_SIZES = (None, 1, 12, 48, 96, 128)
RANKS = (None, 4, 16, 64, 100, 256)


@dataclass(frozen=True)
class Projector:
    """Sizes and options of one projector, as in :func:`prodial_kernels.prodial_linear`."""

    m: int = 2048
    k: int = 768
    n: int = 3072
    block_size: int | None = 1
    r: int | None = 16
    scale: bool = True
    bias: bool = True
    dropout: bool = False
    relu: bool = True
    dtype: torch.dtype = torch.bfloat16
    needs: tuple[bool, ...] = ALL_NEEDS
    columns_before_x: int = 0
    # Sequences, of which X, Y or both are stored channel-first.
    x_channel_first: bool = False
    y_channel_first: bool = False
    sequences: int = 2

    def __str__(self) -> str:
        """What differs from the defaults."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "needs")
        changed = [f"{k}={v}" for k, v in named if v != getattr(type(self), k)]
        absent = "" if all(self.needs) else " needs=" + "".join("01"[need] for need in self.needs)
        return " ".join(changed) + absent

    def as_json(self) -> dict[str, Any]:
        """The fields, for :meth:`from_json`."""
        return {**asdict(self), "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Projector:
        """The projector that :meth:`as_json` wrote."""
        changes = {"dtype": getattr(torch, values["dtype"]), "needs": tuple(values["needs"])}
        return cls(**{**values, **changes})

    def fits(self) -> Projector:
        """The same with K brought to a multiple of the block size."""
        p = self.block_size or 1
        return replace(self, k=max(1, self.k // p) * p)

    def launch(self) -> None:
        """Run forward and backward; under a recorder nothing is computed."""

        def wide_tensor(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device="cuda")

        def narrow(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=self.dtype, device="cuda")

        m, k, n, p, r = self.m, self.k, self.n, self.block_size, self.r
        before = self.columns_before_x
        x, dy = narrow(m, k + before).narrow(1, before, k), narrow(m, n)
        if self.x_channel_first:
            x = narrow(self.sequences, k, m // self.sequences)
        if self.y_channel_first:
            dy = narrow(self.sequences, n, m // self.sequences)
        operands = Operands(
            weight=narrow(n, k),
            blocks=None if p is None else wide_tensor(k // p, p, p),
            scale_deviation=wide_tensor(n) if self.scale else None,
            lora_a=None if r is None else wide_tensor(r, k),
            lora_b=None if r is None else wide_tensor(n, r),
            bias=narrow(n) if self.bias else None,
            noise=torch.empty(1, dtype=torch.int64, device="cuda") if self.dropout else None,
        )
        options = ProjectionOptions(
            "triton", lora_scaling=0.5, lora_dropout=0.1 if self.dropout else 0.0,
            diagonal="relu" if self.relu else "free",
        )  # fmt: skip
        asked = (self.needs[0], False, *self.needs[1:])
        needs = Needs(
            *(need and part is not None
              for need, part in zip(asked, (x, *operands[:6]), strict=True))
        )  # fmt: skip
        if dy.ndim == 2 and is_small(x, operands):
            small_passes.forward(x, operands, options)
            small_passes.backward(dy, x, operands, options, needs)
            return
        length = m // self.sequences if self.y_channel_first else 0
        wide, thin = is_wide(operands), is_thin(operands)
        given = operands._replace(lora_a=None, lora_b=None) if wide else operands
        made = None
        if wide and r is not None and passes.adds_wide(x, operands.weight, padded_rank(r)):
            made = (narrow(m, padded_rank(r)), narrow(n, padded_rank(r)))
        y, h = passes.forward(x, given, options, length, made)
        if made is not None:
            # Of those ranks only what ``thin`` says takes H in backward, as below.
            h = None
        if thin and r is not None:
            given, h = operands._replace(lora_a=None), narrow(m, padded_rank(r))
        kept = Kept(y if needs.scale else None, h)
        passes.backward(dy, x, given, kept, options, needs)
        if wide and not thin:
            product = narrow(n, k) if self.dtype == torch.bfloat16 else wide_tensor(n, k)
            passes.weight_sums(product, operands, options, needs)


def matrix(quick: bool = False) -> Iterator[Projector]:
    """Every projector of the check; the launches they share are compiled once.

    Args:
        quick: Fewer: the block sizes and ranks that put the least and the most on the chip, one
            dtype where the other only repeats it, one gradient trained alone or left out at a time.
            No value of a constant, and no two of them together, is lost by it.
    """
    plain = Projector()
    block_sizes = (None, 1, 48, 128) if quick else BLOCK_SIZES
    ranks = (None, 4, 64, 256) if quick else RANKS
    both = (torch.bfloat16, torch.float16)
    dtypes = both[:1] if quick else both
    # Constants that come from the adapter, with few and with many tokens.
    for m, dtype, p, r, dropout, relu in itertools.product(
        (2048, 16384), both, block_sizes, ranks, (False, True), (True, False)
    ):
        if (dropout and r is None) or (not relu and (p is None or dropout)):
            continue
        yield replace(plain, m=m, dtype=dtype, block_size=p, r=r, dropout=dropout, relu=relu)
    # Tile sizes that come from the shape, small ones first.
    for m, dtype, r, bias, (k, n) in itertools.product(
        (1, 129, 512, 2048, 16384), dtypes, ranks, (False, True), ALIGNED
    ):
        yield replace(plain, dtype=dtype, m=m, k=k, n=n, r=r, bias=bias)
    # Layouts, of lengths that tiles divide, that they do not, and beyond the copy engine.
    for m, dtype, p, r, layout, dropout in itertools.product(
        (1004, 2048, 16384), dtypes, (1, 48), (None, 16, 64, 100), ("x", "y", "xy"), (False, True)
    ):
        if dropout and (r != 16 or dtype == torch.float16):
            continue
        k, n = (1536, 768) if layout == "x" else (768, 3072)
        yield replace(
            plain, dtype=dtype, m=m, k=k, n=n, block_size=p, r=r, dropout=dropout,
            bias=m == 2048, x_channel_first="x" in layout, y_channel_first="y" in layout,
        )  # fmt: skip
    # Ranks that ride along with forward's product, by every tile that it has.
    for m, dtype, r, layout, bias in itertools.product(
        (129, 2048, 16384), dtypes, (16, 32, 64), ("", "x"), (False, True)
    ):
        yield replace(
            plain, dtype=dtype, m=m // 2 * 2 if layout else m, k=1536, n=768, r=r, bias=bias,
            x_channel_first=bool(layout),
        )  # fmt: skip
    # dY scaled in the weight's place, and wide ranks whose sums the output side holds.
    for m, r, bias in itertools.product((300, 2048), (None, 16, 64, 100), (False, True)):
        for k, n in ((2560, 10240), (5120, 2560), (4096, 2688)):
            yield replace(plain, m=m, k=k, n=n, r=r, bias=bias)
    # Weights that are nothing beside their activations.
    for dtype, p, r, bias, (k, n), before in itertools.product(
        both, (None, 1, 48), (None, 4, 32, 64), (False, True),
        ((192, 768), (384, 192), (256, 512)), (0, 3),
    ):  # fmt: skip
        yield replace(
            plain, m=8192, dtype=dtype, k=k, n=n, block_size=p, r=r, bias=bias,
            columns_before_x=before,
        ).fits()  # fmt: skip
    # Rows that the copy engine cannot address.
    for p, r, (k, n), before in itertools.product(
        block_sizes, ranks, ((333, 257), (1340, 3355), (768, 3072)), (0, 3)
    ):
        yield replace(plain, m=777, k=k, n=n, block_size=p, r=r, columns_before_x=before).fits()
    # What is trained, and what is there at all.
    for p, (r, dropout), scale, bias in itertools.product(
        (None, 1, 48), ((None, False), (16, False), (64, False), (256, True)), (False, True),
        (False, True),
    ):  # fmt: skip
        there = (True, p is not None, scale, r is not None, r is not None, bias)
        for needs in one_or_all_but_one(there) if quick else subsets(there):
            yield replace(
                plain, block_size=p, r=r, dropout=dropout, scale=scale, bias=bias, needs=needs
            )


def subsets(there: tuple[bool, ...]) -> Iterator[tuple[bool, ...]]:
    """Every choice of gradients among the parts that are there."""
    return itertools.product(*((False, True) if part else (False,) for part in there))


def one_or_all_but_one(there: tuple[bool, ...]) -> Iterator[tuple[bool, ...]]:
    """Of :func:`subsets`, those with one gradient, with all but one, and with all."""
    few = (1, sum(there) - 1, sum(there))
    return (needs for needs in subsets(there) if sum(needs) in few)


def record(recorder: Recorder, projectors: Iterator[Projector]) -> list[Launch]:
    """Launch each projector under the recorder's device; return what is new."""
    # What a device was like is remembered, and there is a new one.
    passes.device_limits.cache_clear()
    before = len(recorder.launches)
    for each in projectors:
        recorder.origin = each
        each.launch()
    return recorder.launches[before:]
