"""The order in which the kernels are launched, forward and backward."""

from dataclasses import dataclass
from functools import lru_cache
from typing import TypedDict

import torch
from torch import Tensor

from prodial_kernels.kernels.exact_scale import launch_exact_scale
from prodial_kernels.kernels.fold import launch_fold
from prodial_kernels.kernels.gemm import MAX_FUSED_RANK, launch_gemm
from prodial_kernels.kernels.input_side import launch_input_side
from prodial_kernels.kernels.launch import (
    choose_gemm,
    choose_input_side,
    choose_output_side,
    padded_rank,
)
from prodial_kernels.kernels.low_rank import launch_low_rank
from prodial_kernels.kernels.output_side import launch_output_side
from prodial_kernels.kernels.reduce import launch_reduce


@dataclass(frozen=True)
class Needs:
    """Which gradients backward computes."""

    x: bool
    blocks: bool
    scale: bool
    lora_a: bool
    lora_b: bool
    bias: bool


def forward(
    x: Tensor,
    weight: Tensor,
    blocks: Tensor | None,
    scale: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    alpha: float,
    dropout: float,
    relu: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return Y [M, N] and H [M, R_PAD] (None without LoRA) for X [M, K]."""
    r_pad = 16 if lora_a is None else padded_rank(lora_a.shape[0])
    v, a, b = launch_fold(weight, blocks, scale, lora_a, lora_b, alpha, relu, r_pad)
    h = None
    if a is not None:
        h = launch_low_rank(x, a, transposed=True, seed=seed, dropout=dropout)
    config = choose_gemm(x.shape[0], weight.shape[0], companion=False, **device_limits(x.device))
    fused = r_pad <= MAX_FUSED_RANK
    y, _ = launch_gemm(
        x, v, v_transposed=True, config=config, outer=b if fused else None,
        low=h if fused else None, bias=bias,
    )  # fmt: skip
    if h is not None and b is not None and not fused:
        y.addmm_(h, b.T)
    return y, h


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    blocks: Tensor | None,
    scale: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    y: Tensor | None,
    h: Tensor | None,
    alpha: float,
    dropout: float,
    relu: bool,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    """Return the gradients towards x, blocks, scale, lora_a, lora_b and bias, or None for each."""
    m = dy.shape[0]
    if m == 0:
        parts = ((x, needs.x), (blocks, needs.blocks), (scale, needs.scale),
                 (lora_a, needs.lora_a), (lora_b, needs.lora_b), (bias, needs.bias))  # fmt: skip
        return tuple(
            torch.zeros_like(part) if need and part is not None else None for part, need in parts
        )
    r_pad = 16 if lora_a is None else padded_rank(lora_a.shape[0])
    sw, a, b = launch_fold(weight, None, scale, lora_a, lora_b, alpha, relu, r_pad)

    du = t = None
    through_weight = needs.x or needs.blocks
    wants_t = b is not None and (needs.x or needs.lora_a)
    companion = wants_t and through_weight and r_pad <= MAX_FUSED_RANK
    if through_weight:
        config = choose_gemm(m, weight.shape[1], companion=companion, **device_limits(dy.device))
        du, t = launch_gemm(
            dy, sw, v_transposed=False, config=config, inner=b if companion else None
        )
    if wants_t and not companion and b is not None:
        t = launch_low_rank(dy, b, transposed=False, seed=None, dropout=0.0)

    def like(part: Tensor | None, need: bool) -> Tensor | None:
        return torch.empty_like(part) if need and part is not None else None

    del sw
    dscale, db, dbias = like(scale, needs.scale), like(lora_b, needs.lora_b), like(bias, needs.bias)
    partial_b = partial_scale = partial_bias = None
    if dscale is not None or db is not None or dbias is not None:
        partial_b, partial_scale, partial_bias, rows = launch_output_side(
            dy, y, h if dscale is not None or db is not None else None, b, scale, bias,
            need_b=db is not None, need_scale=dscale is not None, need_bias=dbias is not None,
            config=choose_output_side(dy.shape[1]),
        )  # fmt: skip
        if partial_scale is not None:
            launch_exact_scale(dy, x, weight, blocks, partial_scale, rows, relu)

    da, dblocks = like(lora_a, needs.lora_a), like(blocks, needs.blocks)
    partial_a = partial_e = None
    turns = needs.x and (blocks is not None or t is not None)
    if da is not None or dblocks is not None or turns:
        partial_a, partial_e = launch_input_side(
            du, x, t, a, blocks, seed=seed, dropout=dropout, relu=relu, need_x=turns,
            need_a=da is not None, need_blocks=dblocks is not None,
            config=choose_input_side(r_pad),
        )  # fmt: skip
    launch_reduce(
        partial_b, partial_scale, partial_bias, partial_a, partial_e,
        blocks=blocks, db=db, dscale=dscale, dbias=dbias, da=da, dblocks=dblocks,
        n=dy.shape[1], k=x.shape[1], r=0 if lora_a is None else lora_a.shape[0], r_pad=r_pad,
        alpha=alpha, relu=relu,
    )  # fmt: skip
    return du if needs.x else None, dblocks, dscale, da, db, dbias


class DeviceLimits(TypedDict):
    """What the choice of tile sizes needs to know of a device."""

    capability: tuple[int, int]
    processors: int


@lru_cache
def device_limits(device: torch.device) -> DeviceLimits:
    """Compute capability and number of multiprocessors, of a Hopper under the interpreter."""
    if device.type != "cuda":
        return {"capability": (9, 0), "processors": 4}
    properties = torch.cuda.get_device_properties(device)
    return {
        "capability": (properties.major, properties.minor),
        "processors": properties.multi_processor_count,
    }
