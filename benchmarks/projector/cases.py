"""What is measured: cases as data, the sets they come in, and their random operands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.projector.shapes import MODELS
from prodial_kernels.testing import LinearCase


@dataclass(frozen=True)
class Case:
    """One projector: M tokens, K in_features, N out_features, block size P, rank r."""

    m: int
    k: int
    n: int
    p: int = 1
    r: int = 16
    dtype: str = "bfloat16"
    model: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, K, N)."""
        return self.m, self.k, self.n

    @property
    def key(self) -> tuple[int, int, int, int, int, str]:
        """What tells cases apart; the model is only where a shape comes from."""
        return self.m, self.k, self.n, self.p, self.r, self.dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        """Compute dtype; the adapter's masters are fp32 always."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def bytes(self) -> int:
        """About what a process holds of a case: its operand sets, and a graph's tensors."""
        sets = rotating_sets(self, 50 << 20)
        return (sets + 4) * _set_bytes(self) + (256 << 20)

    def __str__(self) -> str:
        return f"{self.m},{self.k},{self.n} P={self.p} r={self.r} {self.dtype}"


BLOCK_SIZES = (12, 24, 48)
TABLE_SHAPES = (
    Case(2048, 768, 3072, model="mamba-130m in_proj"),
    Case(2048, 1536, 768, model="mamba-130m out_proj"),
    Case(16384, 768, 3072, model="mamba-130m in_proj"),
    Case(16384, 1536, 768, model="mamba-130m out_proj"),
    Case(8192, 2048, 8192, model="mamba-1.4b in_proj"),
    Case(8192, 4096, 2048, model="mamba-1.4b out_proj"),
    Case(16384, 2048, 8192, model="mamba-1.4b in_proj"),
    Case(16384, 4096, 2048, model="mamba-1.4b out_proj"),
)
TINY = (Case(16, 24, 40, dtype="float32", model="tiny"),)
# Hybrids whose mixers people fine-tune: the two projectors of each, at few and at many tokens.
_HYBRIDS = {
    "nemotron-3-nano-30b": ((2688, 10304), (4096, 2688)),
    "nemotron-h-8b": ((4096, 18560), (8192, 4096)),
    "granite-4.0-h-micro": ((2048, 8512), (4096, 2048)),
}
# What people train beside the table's shapes, by what is particular about it.
_BESIDE: Mapping[str, tuple[Case, ...]] = {
    "hybrids": tuple(
        Case(m, *shape, model=f"{model} {which}")
        for m in (2048, 8192)
        for model, shapes in _HYBRIDS.items()
        for which, shape in zip(("in_proj", "out_proj"), shapes, strict=True)
    ),
    "vision": (
        Case(25216, 192, 768, model="vim-tiny in_proj"),
        Case(25216, 384, 192, model="vim-tiny out_proj"),
    ),
    "few-tokens": (
        Case(2048, 2560, 10240, model="mamba-2.8b in_proj"),
        Case(2048, 5120, 2560, model="mamba-2.8b out_proj"),
        Case(2048, 4096, 16384, model="falcon-mamba-7b in_proj"),
        Case(2048, 8192, 4096, model="falcon-mamba-7b out_proj"),
        Case(512, 768, 3072, model="mamba-130m in_proj"),
    ),
    "wide-ranks": tuple(
        Case(8192, 2048, 8192, r=r, model="mamba-1.4b in_proj") for r in (64, 128, 256)
    ),
}
GROUPS: Mapping[str, tuple[Case, ...]] = {
    **_BESIDE, "all": (*TABLE_SHAPES, *(case for cases in _BESIDE.values() for case in cases)),
    # Of the others, those that products in fp8 are measured at.
    "fp8": (
        Case(8192, 2048, 8192, model="mamba-1.4b in_proj"),
        Case(8192, 4096, 2048, model="mamba-1.4b out_proj"),
        Case(16384, 2048, 8192, model="mamba-1.4b in_proj"),
        Case(16384, 4096, 2048, model="mamba-1.4b out_proj"),
        Case(2048, 4096, 16384, model="falcon-mamba-7b in_proj"),
        Case(16384, 768, 3072, model="mamba-130m in_proj"),
    ),
}  # fmt: skip
"""By what is particular about them; ``"all"`` are those of the table too."""


def block_size(wanted: int, k: int) -> int:
    """``wanted`` where it divides k, else the next power of two (12 -> 16, 24 -> 32, 48 -> 64)."""
    return wanted if k % wanted == 0 else 1 << wanted.bit_length()


def variants_of(case: Case) -> list[Case]:
    """The case with the block sizes of the paper, and with a larger rank."""
    blocks = [replace(case, p=block_size(p, case.k)) for p in BLOCK_SIZES]
    return [*blocks, replace(case, r=4 * case.r)]


def model_cases(model: str, tokens: Sequence[int] = (2048, 16384)) -> tuple[Case, ...]:
    """Return both projectors of one model at each number of tokens."""
    if model not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}; got {model!r}")
    sizes = MODELS[model]
    return tuple(
        Case(m, *shape, model=f"{model} {which}")
        for m in tokens
        for which, shape in (("in_proj", sizes.in_proj), ("out_proj", sizes.out_proj))
    )


def draw(case: Case, device: str, seed: int = 0) -> LinearCase:
    """Draw a projector a little way into its training: random data, fp32 masters, no bias.

    The deviations from the pretrained weight are large enough that leaving any part of the
    adapter out is an error of several percent, which the check sees.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator) * std

    dtype = case.torch_dtype
    return LinearCase(
        x=normal(case.m, case.k).to(dtype),
        weight=normal(case.n, case.k, std=case.k**-0.5).to(dtype),
        blocks=normal(case.k // case.p, case.p, case.p, std=0.2 * case.p**-0.5),
        scale=1 + normal(case.n, std=0.1),
        lora_a=normal(case.r, case.k, std=case.k**-0.5),
        lora_b=normal(case.n, case.r, std=0.3 * case.r**-0.5),
        bias=None,
        grad_output=normal(case.m, case.n).to(dtype),
    )


def rotating_sets(case: Case, cache_bytes: int) -> int:
    """How many operand sets must take turns so that none is still in a cache of this size."""
    return max(2, min(12, -(-3 * cache_bytes // _set_bytes(case))))


def _set_bytes(case: Case) -> int:
    """X, W, dY and Y."""
    elements = case.m * case.k + case.n * case.k + 2 * case.m * case.n
    return case.torch_dtype.itemsize * elements
