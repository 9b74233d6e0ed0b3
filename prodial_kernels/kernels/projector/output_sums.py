"""What is summed over the tokens of dY: the parts of the gradients towards s, B and the bias."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from prodial_kernels.kernels.choices.tile_sizes import ExactScaleConfig, OutputSideConfig
from prodial_kernels.kernels.projector.exact_scale import launch_exact_scale
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
    weight: Tensor,
    blocks: Tensor | None,
    scale_deviation: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    h: Tensor | None,
    *,
    alpha: float,
    relu: bool,
    need_b: bool,
    need_scale: bool,
    need_bias: bool,
    config: OutputSideConfig,
    exact: ExactScaleConfig,
    side: SideStream | None,
) -> OutputSums:
    """Launch the sums, and ds anew where the division form is not sound, on ``side``.

    Shapes as in :func:`prodial_kernels.kernels.projector.passes.backward`. On a side stream, what
    it returns must outlive the join.
    """
    if not (need_b or need_scale or need_bias):
        return OutputSums()
    partial_b, partial_scale, partial_bias = launch_output_side(
        dy, y, h if need_scale or need_b else None, scale_deviation, lora_b, bias,
        alpha=alpha, need_b=need_b, need_scale=need_scale, need_bias=need_bias,
        config=config, side=side,
    )  # fmt: skip
    anew = None
    if partial_scale is not None:
        anew = launch_exact_scale(
            dy, x, weight, blocks, partial_scale, relu=relu, config=exact, side=side
        )
    return OutputSums(partial_b, partial_scale, anew, partial_bias)
