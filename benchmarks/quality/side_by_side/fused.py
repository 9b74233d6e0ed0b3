"""What lies between a Mamba-2 mixer's projectors, for short sequences of many runs, in Triton.

Forward is two kernels (convolution and scan of a whole sequence; gate and norm), backward three.
Everything but the projected input and the scan's result is made again in backward. The formulas
are those of ``mamba2.py``, which is what tests and :func:`check` hold them to.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["LAUNCH", "between"]

_TAPS = 4
_ANY = ["batch", "dtb_run", "a_run", "d_run"]
"""Numbers that are multiples of 16 in one stack and not in the next: no reason to compile again."""
_STEP = 16
"""Widths are handed over in units of so many values, or fewer, so that loads take several."""
_PARTS = 4
"""Programs that a sequence's heads are dealt to in backward."""
LAUNCH = {
    "scores": {"num_warps": 4}, "scan": {"num_warps": 4}, "norm": {"num_warps": 4},
    "scan backward": {"num_warps": 4}, "scores backward": {"num_warps": 4},
    "convolution backward": {"num_warps": 4}, "norm backward": {"num_warps": 4},
}  # fmt: skip
"""Options of each kernel's launch. On an H200 that others used too, at 81 runs of 16 × 64 tokens, a
layer's forward and backward took 4.14 ms so, 4.68 with 8 warps for the scan's backward and 4.76
with 16; twice as many parts 4.43; the other kernels' made 0.3 ms at most."""


@triton.jit
def _convolved(
    x_ptr, w_ptr, bias_ptr, width, length, column, channel, places, TAPS: tl.constexpr
):  # fmt: skip
    """[places, columns] before the activation; ``channel`` counts from the first convolved one."""
    y = tl.load(bias_ptr + channel)[None, :] + tl.zeros(
        [places.shape[0], channel.shape[0]], tl.float32
    )
    for k in tl.static_range(TAPS):
        source = places - (TAPS - 1 - k)
        inside = (source >= 0) & (source < length)
        x = tl.load(
            x_ptr + source[:, None] * width + column[None, :], mask=inside[:, None], other=0.0
        )
        y += x.to(tl.float32) * tl.load(w_ptr + channel * TAPS + k)[None, :]
    return y


@triton.jit
def _step(x_ptr, bias_ptr, width, length, column, head, places):
    """The step dt before and after softplus, [places]; 0 behind the end."""
    raw = tl.load(x_ptr + places * width + column + head, mask=places < length, other=0.0)
    raw = raw.to(tl.float32) + tl.load(bias_ptr + head)
    step = tl.where(raw > 20.0, raw, tl.log(1.0 + tl.exp(tl.minimum(raw, 20.0))))
    return raw, tl.where(places < length, step, 0.0)


@triton.jit
def _states(
    x_ptr, w_ptr, cb_ptr, width, length, inner, places, STATES: tl.constexpr, TAPS: tl.constexpr
):  # fmt: skip
    """B and C before their activation, [places, states] each."""
    states = inner + tl.arange(0, STATES)
    pre_b = _convolved(x_ptr, w_ptr, cb_ptr, width, length, inner + states, states, places, TAPS)
    pre_c = _convolved(
        x_ptr, w_ptr, cb_ptr, width, length, inner + STATES + states, STATES + states, places, TAPS
    )
    return pre_b, pre_c


@triton.jit
def _square(places, PLACES: tl.constexpr):
    """Offsets of [places, places]."""
    return places[:, None] * PLACES + places[None, :]


@triton.jit(do_not_specialize=["batch"])
def _scores_forward(
    x_ptr, w_ptr, cb_ptr, scores_ptr, batch, length, units, inner, w_run, cb_run,
    PLACES: tl.constexpr, STATES: tl.constexpr, TAPS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """C Bᵀ of a sequence, which its heads share."""
    width = units * STEP
    sequence = tl.program_id(0).to(tl.int64)
    run = sequence // batch
    places = tl.arange(0, PLACES)
    pre_b, pre_c = _states(
        x_ptr + sequence * length * width, w_ptr + run * w_run, cb_ptr + run * cb_run, width,
        length, inner, places, STATES, TAPS,
    )  # fmt: skip
    scores = tl.dot(pre_c * tl.sigmoid(pre_c), tl.trans(pre_b * tl.sigmoid(pre_b)))
    tl.store(scores_ptr + sequence * PLACES * PLACES + _square(places, PLACES), scores)


@triton.jit
def _decay(elapsed, places):
    """[places, places]: what is left of an earlier place; 0 of a later one."""
    gap = tl.where(places[:, None] >= places[None, :], elapsed[:, None] - elapsed[None, :], -1e30)
    return tl.exp(gap)


@triton.jit(do_not_specialize=_ANY)
def _scan_forward(
    x_ptr, w_ptr, cb_ptr, dtb_ptr, a_ptr, d_ptr, scores_ptr, y_ptr, batch, length, units, heads,
    w_run, cb_run, dtb_run, a_run, d_run,
    PLACES: tl.constexpr, HEAD: tl.constexpr, STATES: tl.constexpr, TAPS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """One head of a sequence."""
    width = units * STEP
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    run = sequence // batch
    inner = heads * HEAD
    x_ptr += sequence * length * width
    y_ptr += sequence * length * inner
    places = tl.arange(0, PLACES)
    channel = head * HEAD + tl.arange(0, HEAD)
    pre = _convolved(
        x_ptr, w_ptr + run * w_run, cb_ptr + run * cb_run, width, length, inner + channel, channel,
        places, TAPS,
    )  # fmt: skip
    x = pre * tl.sigmoid(pre)
    _, dt = _step(
        x_ptr, dtb_ptr + run * dtb_run, width, length, 2 * inner + 2 * STATES, head, places
    )
    elapsed = tl.cumsum(dt * -tl.exp(tl.load(a_ptr + run * a_run + head)), 0)
    scores = tl.load(scores_ptr + sequence * PLACES * PLACES + _square(places, PLACES))
    y = tl.dot(scores * _decay(elapsed, places), x * dt[:, None])
    y += tl.load(d_ptr + run * d_run + head) * x
    tl.store(
        y_ptr + places[:, None] * inner + channel[None, :], y.to(y_ptr.dtype.element_ty),
        mask=places[:, None] < length,
    )  # fmt: skip


@triton.jit(do_not_specialize=_ANY)
def _scan_backward(
    x_ptr, w_ptr, cb_ptr, dtb_ptr, a_ptr, d_ptr, scores_ptr, gy_ptr, gscores_ptr, gpre_ptr, gx_ptr,
    gdtb_ptr, ga_ptr, gd_ptr, batch, length, units, heads, w_run, cb_run, dtb_run, a_run, d_run,
    PARTS: tl.constexpr, PLACES: tl.constexpr, HEAD: tl.constexpr, STATES: tl.constexpr,
    TAPS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Every PARTS-th head of a sequence; ``gscores`` are their sums."""
    width = units * STEP
    sequence = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    run = sequence // batch
    inner = heads * HEAD
    channels = inner + 2 * STATES
    x_ptr += sequence * length * width
    gx_ptr += sequence * length * width
    gy_ptr += sequence * length * inner
    gpre_ptr += sequence * length * channels
    w_ptr += run * w_run
    cb_ptr += run * cb_run
    dtb_ptr += run * dtb_run
    a_ptr += run * a_run
    d_ptr += run * d_run
    places = tl.arange(0, PLACES)
    within = places[:, None] < length
    square = _square(places, PLACES)
    scores_ptr += sequence * PLACES * PLACES
    gscores = tl.zeros([PLACES, PLACES], tl.float32)
    for head in tl.range(part, heads, PARTS, num_stages=1):
        channel = head * HEAD + tl.arange(0, HEAD)
        pre = _convolved(
            x_ptr, w_ptr, cb_ptr, width, length, inner + channel, channel, places, TAPS
        )
        gate = tl.sigmoid(pre)
        x = pre * gate
        raw, dt = _step(x_ptr, dtb_ptr, width, length, 2 * inner + 2 * STATES, head, places)
        rate = -tl.exp(tl.load(a_ptr + head))
        decay = _decay(tl.cumsum(dt * rate, 0), places)
        mixed = tl.load(scores_ptr + square) * decay
        gy = tl.load(
            gy_ptr + places[:, None] * inner + channel[None, :], mask=within, other=0.0
        ).to(tl.float32)
        gmixed = tl.dot(gy, tl.trans(x * dt[:, None]))
        gscores += gmixed * decay
        turned = gmixed * mixed
        gelapsed = tl.sum(turned, 1) - tl.sum(turned, 0)
        # The sum over this and later places.
        later = tl.sum(gelapsed, 0) - tl.cumsum(gelapsed, 0) + gelapsed
        gvalues = tl.dot(tl.trans(mixed), gy)
        tl.store(gd_ptr + sequence * heads + head, tl.sum(gy * x))
        gx = gvalues * dt[:, None] + tl.load(d_ptr + head) * gy
        gdt = tl.sum(gvalues * x, 1) + later * rate
        tl.store(ga_ptr + sequence * heads + head, tl.sum(later * dt) * rate)
        graw = tl.where(places < length, gdt * tl.sigmoid(raw), 0.0)
        tl.store(gdtb_ptr + sequence * heads + head, tl.sum(graw))
        tl.store(
            gx_ptr + places * width + 2 * inner + 2 * STATES + head,
            graw.to(gx_ptr.dtype.element_ty), mask=places < length,
        )  # fmt: skip
        gpre = gx * gate * (1.0 + pre * (1.0 - gate))
        tl.store(
            gpre_ptr + places[:, None] * channels + channel[None, :],
            gpre.to(gpre_ptr.dtype.element_ty), mask=within,
        )  # fmt: skip
    tl.store(gscores_ptr + (sequence * PARTS + part) * PLACES * PLACES + square, gscores)


@triton.jit(do_not_specialize=["batch"])
def _scores_backward(
    x_ptr, w_ptr, cb_ptr, gscores_ptr, gpre_ptr, batch, length, units, inner, w_run, cb_run,
    PARTS: tl.constexpr, PLACES: tl.constexpr, STATES: tl.constexpr, TAPS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Gradients of B and C before their activation."""
    width = units * STEP
    sequence = tl.program_id(0).to(tl.int64)
    run = sequence // batch
    places = tl.arange(0, PLACES)
    square = _square(places, PLACES)
    gscores = tl.zeros([PLACES, PLACES], tl.float32)
    for part in tl.static_range(PARTS):
        gscores += tl.load(gscores_ptr + (sequence * PARTS + part) * PLACES * PLACES + square)
    pre_b, pre_c = _states(
        x_ptr + sequence * length * width, w_ptr + run * w_run, cb_ptr + run * cb_run, width,
        length, inner, places, STATES, TAPS,
    )  # fmt: skip
    gate_b, gate_c = tl.sigmoid(pre_b), tl.sigmoid(pre_c)
    gb = tl.dot(tl.trans(gscores), pre_c * gate_c) * gate_b * (1.0 + pre_b * (1.0 - gate_b))
    gc = tl.dot(gscores, pre_b * gate_b) * gate_c * (1.0 + pre_c * (1.0 - gate_c))
    channels = inner + 2 * STATES
    target = gpre_ptr + sequence * length * channels + places[:, None] * channels
    target += inner + tl.arange(0, STATES)[None, :]
    within = places[:, None] < length
    tl.store(target, gb.to(gpre_ptr.dtype.element_ty), mask=within)
    tl.store(target + STATES, gc.to(gpre_ptr.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=["batch"])
def _convolution_backward(
    x_ptr, w_ptr, gpre_ptr, gx_ptr, gw_ptr, gcb_ptr, batch, length, units, inner, channels, w_run,
    PLACES: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    width = units * STEP
    sequence = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = channel < channels
    w_ptr += (sequence // batch) * w_run
    places = tl.arange(0, PLACES)
    x_ptr += sequence * length * width + inner + channel[None, :]
    gx_ptr += sequence * length * width + inner + channel[None, :]
    gpre_ptr += sequence * length * channels + channel[None, :]
    gx = tl.zeros([PLACES, BLOCK], tl.float32)
    mask = (places[:, None] < length) & there[None, :]
    own = tl.load(gpre_ptr + places[:, None] * channels, mask=mask, other=0.0).to(tl.float32)
    tl.store(gcb_ptr + sequence * channels + channel, tl.sum(own, 0), mask=there)
    for k in tl.static_range(TAPS):
        shift = TAPS - 1 - k
        w = tl.load(w_ptr + channel * TAPS + k, mask=there, other=0.0)
        later = places[:, None] + shift
        gpre = tl.load(
            gpre_ptr + later * channels, mask=(later < length) & there[None, :], other=0.0
        )
        gx += gpre.to(tl.float32) * w[None, :]
        source = places[:, None] - shift
        x = tl.load(
            x_ptr + source * width, mask=(source >= 0) & (source < length) & there[None, :],
            other=0.0,
        )  # fmt: skip
        gw = tl.sum(own * x.to(tl.float32), 0)
        tl.store(gw_ptr + (sequence * channels + channel) * TAPS + k, gw, mask=there)
    tl.store(gx_ptr + places[:, None] * width, gx.to(gx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_forward(
    x_ptr,
    y_ptr,
    w_ptr,
    out_ptr,
    rows_a_run,
    units,
    inner,
    epsilon,
    w_run,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    width = units * STEP
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < inner
    z = tl.load(x_ptr + row * width + column, mask=there, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + row * inner + column, mask=there, other=0.0).to(tl.float32)
    gated = y * z * tl.sigmoid(z)
    scale = tl.rsqrt(tl.sum(gated * gated, 0) / inner + epsilon)
    w = tl.load(w_ptr + (row // rows_a_run) * w_run + column, mask=there, other=0.0)
    out = gated * scale * w
    tl.store(out_ptr + row * inner + column, out.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["batch"])
def _norm_backward(
    x_ptr, y_ptr, w_ptr, gout_ptr, gx_ptr, gy_ptr, gw_ptr, batch, length, units, inner, epsilon,
    w_run, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    width = units * STEP
    sequence = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < inner
    w = tl.load(w_ptr + (sequence // batch) * w_run + column, mask=there, other=0.0)
    gw = tl.zeros([BLOCK], tl.float32)
    for place in range(length):
        row = sequence * length + place
        z = tl.load(x_ptr + row * width + column, mask=there, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row * inner + column, mask=there, other=0.0).to(tl.float32)
        gout = tl.load(gout_ptr + row * inner + column, mask=there, other=0.0).to(tl.float32)
        gate = tl.sigmoid(z)
        open = z * gate
        gated = y * open
        scale = tl.rsqrt(tl.sum(gated * gated, 0) / inner + epsilon)
        gw += gout * gated * scale
        gnormed = gout * w
        ggated = scale * (gnormed - gated * scale * scale * (tl.sum(gnormed * gated, 0) / inner))
        gz = ggated * y * gate * (1.0 + z * (1.0 - gate))
        gy = ggated * open
        tl.store(gx_ptr + row * width + column, gz.to(gx_ptr.dtype.element_ty), mask=there)
        tl.store(gy_ptr + row * inner + column, gy.to(gy_ptr.dtype.element_ty), mask=there)
    tl.store(gw_ptr + sequence * inner + column, gw, mask=there)


def _places(length: int) -> int:
    return max(16, triton.next_power_of_2(length))


def _run_stride(tensor: Tensor) -> int:
    """Elements from one run's values to the next; 0 where all share them."""
    return 0 if len(tensor) == 1 else tensor[0].numel()


class _Between(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, cb: Tensor, dtb: Tensor, a: Tensor, d: Tensor,
        norm: Tensor, states: int, epsilon: float,
    ) -> Tensor:  # fmt: skip
        runs, batch, length, width = x.shape
        heads, inner = a.shape[-1], norm.shape[-1]
        small = [t.float().contiguous() for t in (w, cb, dtb, a, d, norm)]
        y = torch.empty(runs, batch, length, inner, dtype=x.dtype, device=x.device)
        out = torch.empty_like(y)
        places, step = _places(length), math.gcd(width, _STEP)
        sizes = {"PLACES": places, "STATES": states, "TAPS": _TAPS, "STEP": step}
        strides, units = [_run_stride(t) for t in small], width // step
        scores = torch.empty(runs, batch, places, places, device=x.device)
        _scores_forward[runs * batch,](
            x, *small[:2], scores, batch, length, units, inner, *strides[:2], **sizes,
            **LAUNCH["scores"],
        )  # fmt: skip
        _scan_forward[runs * batch, heads](
            x, *small[:5], scores, y, batch, length, units, heads, *strides[:5], **sizes,
            HEAD=inner // heads, **LAUNCH["scan"],
        )  # fmt: skip
        _norm_forward[runs * batch * length,](
            x, y, small[5], out, batch * length, units, inner, epsilon, strides[5],
            BLOCK=triton.next_power_of_2(inner), STEP=step, **LAUNCH["norm"],
        )  # fmt: skip
        ctx.save_for_backward(x, y, scores, *small)
        ctx.sizes, ctx.strides, ctx.epsilon = sizes, strides, epsilon
        ctx.shapes = [t.shape for t in (w, cb, dtb, a, d, norm)]
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        x, y, scores, *small = ctx.saved_tensors
        gout = gradients[0].contiguous()
        runs, batch, length, width = x.shape
        heads, inner = small[3].shape[-1], small[5].shape[-1]
        channels = small[1].shape[-1]
        strides, step = ctx.strides, ctx.sizes["STEP"]
        units = width // step

        def partial(*shape: int) -> Tensor:
            return torch.empty(runs, batch, *shape, device=x.device)

        gx, gy = torch.empty_like(x), torch.empty_like(y)
        gpre = torch.empty(runs, batch, length, channels, dtype=x.dtype, device=x.device)
        gw, gcb = partial(channels, _TAPS), partial(channels)
        gdtb, ga, gd, gnorm = partial(heads), partial(heads), partial(heads), partial(inner)
        _norm_backward[runs * batch,](
            x, y, small[5], gout, gx, gy, gnorm, batch, length, units, inner, ctx.epsilon,
            strides[5], BLOCK=triton.next_power_of_2(inner), STEP=step,
            **LAUNCH["norm backward"],
        )  # fmt: skip
        parts = math.gcd(heads, _PARTS)
        gscores = torch.empty(runs, batch, parts, *scores.shape[2:], device=x.device)
        _scan_backward[runs * batch, parts](
            x, *small[:5], scores, gy, gscores, gpre, gx, gdtb, ga, gd, batch, length, units, heads,
            *strides[:5], **ctx.sizes, PARTS=parts, HEAD=inner // heads,
            **LAUNCH["scan backward"],
        )  # fmt: skip
        _scores_backward[runs * batch,](
            x, *small[:2], gscores, gpre, batch, length, units, inner, *strides[:2], **ctx.sizes,
            PARTS=parts, **LAUNCH["scores backward"],
        )  # fmt: skip
        block = 64
        _convolution_backward[runs * batch, triton.cdiv(channels, block)](
            x, small[0], gpre, gx, gw, gcb, batch, length, units, inner, channels, strides[0],
            PLACES=_places(length), BLOCK=block, TAPS=_TAPS, STEP=step,
            **LAUNCH["convolution backward"],
        )  # fmt: skip
        made = []
        for part, shape in zip((gw, gcb, gdtb, ga, gd, gnorm), ctx.shapes, strict=True):
            total = part.sum(1) if shape[0] > 1 or runs == 1 else part.sum((0, 1))
            made.append(total.view(shape))
        return gx, *made, None, None


def between(
    x: Tensor, w: Tensor, cb: Tensor, dtb: Tensor, a: Tensor, d: Tensor, norm: Tensor,
    states: int, epsilon: float,
) -> Tensor:  # fmt: skip
    """From a mixer's in_proj to its out_proj; arguments as ``mamba2.between`` has them.

    Raises:
        ValueError: An input that is not fp32, a convolution that is not of four taps, or sizes that
            are no power of two.
    """
    if x.dtype != torch.float32:
        # In bf16 a kernel read outside its memory on an H200, under Triton 3.6.
        raise ValueError(f"x: expected float32, got {x.dtype}; run without fused=True (`--eager`)")
    head = norm.shape[-1] // a.shape[-1]
    if w.shape[-1] != _TAPS or head & (head - 1) or states & (states - 1) or min(head, states) < 16:
        raise ValueError(
            f"base: expected four taps, heads and states of a power of two from 16 on, got "
            f"{w.shape[-1]}, {head} and {states}; run without fused=True"
        )
    made: Tensor = _Between.apply(x.contiguous(), w, cb, dtb, a, d, norm, states, epsilon)
    return made
