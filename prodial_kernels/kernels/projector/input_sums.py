"""What follows from dU and X: dX in dU's memory, and the parts of the gradients of A and D_a."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor

from prodial_kernels.kernels.choices.tile_sizes import InputSideConfig
from prodial_kernels.kernels.projector.input_side import launch_input_side
from prodial_kernels.kernels.projector.operands import Needs, Operands, ProjectionOptions
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
    operands: Operands,
    options: ProjectionOptions,
    needs: Needs,
    *,
    config: InputSideConfig,
    triggers_next: bool,
) -> InputSums:
    """Overwrite ``du`` by dX where that is needed, and sum over the tokens of X.

    Shapes as in :func:`prodial_kernels.kernels.projector.input_side.launch_input_side`;
    ``triggers_next`` as there. ``needs`` asks only for parts that ``operands`` have.
    """
    blocks, seed = operands.blocks, operands.noise
    changes_x = needs.x and (blocks is not None or t is not None)
    if not (changes_x or needs.lora_a or needs.blocks):
        return InputSums()
    walk = partial(
        launch_input_side, x=x, options=options, config=config, triggers_next=triggers_next
    )
    # A wide block beside a wide rank is too much for one program: then dA, which reads no dU,
    # the blocks' part of dX and the LoRA part come one after the other.
    if t is None or seed is None or block_size_of(blocks) <= 64 or t.shape[1] <= 32:
        parts = walk(
            du, t=t, operands=operands, need_x=changes_x, need_a=needs.lora_a,
            need_blocks=needs.blocks,
        )  # fmt: skip
        return InputSums(*parts, launched=True)
    partial_a = partial_e = None
    if needs.lora_a:
        partial_a, _ = walk(
            None, t=t, operands=operands, need_x=False, need_a=True, need_blocks=False
        )
    if changes_x or needs.blocks:
        alone = operands._replace(lora_a=None, noise=None)
        _, partial_e = walk(
            du, t=None, operands=alone, need_x=needs.x, need_a=False, need_blocks=needs.blocks
        )
    if needs.x:
        alone = operands._replace(blocks=None)
        walk(du, t=t, operands=alone, need_x=True, need_a=False, need_blocks=False)
    return InputSums(partial_a, partial_e, launched=True)
