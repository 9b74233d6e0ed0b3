"""The projectors of real models, as (in_features, out_features)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Projectors:
    """The two projectors of one mixer, and how many mixers the model has."""

    in_proj: tuple[int, int]
    out_proj: tuple[int, int]
    layers: int

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return self.in_proj[0]


def mamba1(width: int, layers: int, inner: int | None = None) -> Projectors:
    """Mamba: in_proj makes x and z."""
    inner = inner or 2 * width
    return Projectors((width, 2 * inner), (inner, width), layers)


def mamba2(
    width: int,
    layers: int,
    state: int,
    *,
    inner: int | None = None,
    groups: int = 1,
    head: int = 64,
) -> Projectors:
    """Mamba-2: in_proj makes z, x, B, C and dt."""
    inner = inner or 2 * width
    return Projectors(
        (width, 2 * inner + 2 * groups * state + inner // head), (inner, width), layers
    )


# From the configurations that the models are published with: config.json of state-spaces/mamba-*
# and mamba2-*, tiiuae/falcon-mamba-7b, Zyphra/Zamba2-*; vision_mamba's model definitions; and the
# table of sizes in transformers' page on FalconH1 (d_ssm = heads × d_head; one group by default).
MODELS: Mapping[str, Projectors] = {
    "mamba-130m": mamba1(768, 24),
    "mamba-370m": mamba1(1024, 48),
    "mamba-790m": mamba1(1536, 48),
    "mamba-1.4b": mamba1(2048, 48),
    "mamba-2.8b": mamba1(2560, 64),
    "falcon-mamba-7b": mamba1(4096, 64),
    "vim-tiny": mamba1(192, 24),
    "vim-small": mamba1(384, 24),
    "vim-base": mamba1(768, 24),
    "mamba2-130m": mamba2(768, 24, 128),
    "mamba2-370m": mamba2(1024, 48, 128),
    "mamba2-780m": mamba2(1536, 48, 128),
    "mamba2-1.3b": mamba2(2048, 48, 128),
    "mamba2-2.7b": mamba2(2560, 64, 128),
    "zamba2-1.2b": mamba2(2048, 38, 128),
    "zamba2-2.7b": mamba2(2560, 54, 64),
    "falcon-h1-0.5b": mamba2(1024, 36, 128, inner=1536),
    "falcon-h1-1.5b": mamba2(2048, 24, 256, inner=3072),
    "falcon-h1-3b": mamba2(2560, 32, 256, inner=4096, head=128),
    "falcon-h1-7b": mamba2(3072, 44, 256, inner=3072, head=128),
}
