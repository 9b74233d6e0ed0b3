"""What is summed over the tokens of dY: the parts of the gradients towards s, B and the bias."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from prodial_kernels.kernels.choices.tile_sizes import ExactScaleConfig, OutputSideConfig
from prodial_kernels.kernels.projector.exact_scale import launch_exact_scale
from prodial_kernels.kernels.projector.operands import Kept, Needs, Operands, ProjectionOptions
from prodial_kernels.kernels.projector.output_side import launch_output_side
from prodial_kernels.kernels.replay.streams import SideStream


class OutputSums(NamedTuple):
    """Parts in fp32 as output_side.py and exact_scale.py leave them; None where not needed."""

    b: Tensor | None = None
    scale: Tensor | None = None
    exact: Tensor | None = None
    bias: Tensor | None = None


def launch_output_sums(
    dy: Tensor,
    x: Tensor,
    operands: Operands,
    kept: Kept,
    options: ProjectionOptions,
    needs: Needs,
    *,
    config: OutputSideConfig,
    exact: ExactScaleConfig,
    side: SideStream | None,
) -> OutputSums:
    """Launch the sums, and ds anew where the division form is not sound, on ``side``.

    Shapes as in :func:`prodial_kernels.kernels.projector.passes.backward`; ``needs`` asks only for
    parts that ``operands`` have. On a side stream, what it returns must outlive the join.
    """
    if not (needs.lora_b or needs.scale or needs.bias):
        return OutputSums()
    low = kept.h if needs.scale or needs.lora_b else None
    b, scale, bias = launch_output_side(
        dy, kept.y, low, operands, options, needs, config=config, side=side
    )
    anew = None
    if scale is not None:
        anew = launch_exact_scale(dy, x, operands, scale, options, config=exact, side=side)
    return OutputSums(b, scale, anew, bias)
