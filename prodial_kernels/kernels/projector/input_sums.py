"""What follows from dU and X: dX in its place, and the parts of the gradients of A and D_a."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor

from prodial_kernels.kernels.choices.tile_sizes import InputSideConfig
from prodial_kernels.kernels.projector.input_side import launch_input_side
from prodial_kernels.kernels.projector.tiles import block_size_of


class InputSums(NamedTuple):
    """Parts in fp32 as input_side.py leaves them; None where not needed."""

    a: Tensor | None = None
    blocks: Tensor | None = None
    launched: bool = False


def launch_input_sums(
    du: Tensor | None,
    x: Tensor,
    t: Tensor | None,
    lora_a: Tensor | None,
    blocks: Tensor | None,
    *,
    seed: Tensor | None,
    dropout: float,
    relu: bool,
    need_x: bool,
    need_a: bool,
    need_blocks: bool,
    config: InputSideConfig,
    opens: bool,
) -> InputSums:
    """Turn ``du`` into dX in place where ``need_x``, and sum over the tokens of X.

    Shapes as in :func:`prodial_kernels.kernels.projector.input_side.launch_input_side`;
    ``opens`` as there.
    """
    turns = need_x and (blocks is not None or t is not None)
    if not (turns or need_a or need_blocks):
        return InputSums()
    walk = partial(launch_input_side, dropout=dropout, relu=relu, config=config, opens=opens)
    p = block_size_of(blocks)
    # A wide block beside a wide rank is too much for one program: then dA, which reads no dU,
    # the blocks' part of dX and the LoRA part come one after the other.
    if t is None or seed is None or p <= 64 or t.shape[1] <= 32:
        parts = walk(
            du, x, t, lora_a, blocks, seed=seed, need_x=turns, need_a=need_a,
            need_blocks=need_blocks,
        )  # fmt: skip
        return InputSums(*parts, launched=True)
    partial_a = partial_e = None
    if need_a:
        partial_a, _ = walk(
            None, x, t, lora_a, blocks, seed=seed, need_x=False, need_a=True, need_blocks=False
        )
    if turns or need_blocks:
        _, partial_e = walk(
            du, x, None, None, blocks, seed=None, need_x=need_x, need_a=False,
            need_blocks=need_blocks,
        )  # fmt: skip
    if need_x:
        walk(du, x, t, lora_a, None, seed=seed, need_x=True, need_a=False, need_blocks=False)
    return InputSums(partial_a, partial_e, launched=True)
