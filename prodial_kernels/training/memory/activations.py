"""Bytes that a block keeps for its backward pass, by level, and its largest temporaries.

Each formula names the tensors it counts; M tokens, widths d and E, state size N as in
:class:`~prodial_kernels.training.memory.shapes.LayerShape`. What mamba_ssm's Mamba-1 keeps was
compared with whole models on an H100 (bf16, r = 16): see
``tests/training/memory/test_memory_plan.py``.
"""

from __future__ import annotations

from prodial_kernels.kernels.choices.backward_plan import choose_backward
from prodial_kernels.kernels.choices.tile_sizes import padded_rank
from prodial_kernels.models.layers.recompute import CHECKPOINT, KEEP, NORM, OFFLOAD, RECOMPUTE
from prodial_kernels.ops.layout import direct_length
from prodial_kernels.ops.projection import LEAST_PREFETCHED
from prodial_kernels.training.memory.part_bytes import Part, Tokens, parts_beside
from prodial_kernels.training.memory.shapes import MAMBA, MAMBA2, OTHER, LayerShape

_FP32 = 4
# Tokens that mamba_ssm's selective scan covers with one saved state.
_SCAN_CHUNK = 2048
# Most splits of the tokens over which the projector's kernels sum gradients towards their input.
_SPLITS = 32


def levels_of(layer: LayerShape) -> tuple[str, ...]:
    """Return the levels that change something for a layer, from the fastest to the smallest."""
    levels = [KEEP]
    # Without a mixer, and its adapters, the norm's output is not kept in any case.
    if layer.separate_norm and layer.mixer != OTHER:
        levels.append(NORM)
    if layer.mixer == MAMBA and layer.fused:
        levels.append(RECOMPUTE)
    levels.append(CHECKPOINT)
    return tuple(levels) if layer.two_streams else (*levels, OFFLOAD)


def kept(layer: LayerShape, tokens: Tokens, level: str) -> int:
    """Bytes from a block's forward to its backward at a level."""
    m, c = tokens.count, tokens.itemsize
    if level == OFFLOAD:
        return 0
    if level == CHECKPOINT:
        if layer.two_streams:
            return (c + _FP32) * m * layer.width
        residual = _FP32 if layer.separate_norm and not layer.rounds_input else c
        return residual * m * layer.width
    beside = sum(part.kept for part in _beside(layer, tokens))
    if layer.mixer == OTHER and layer.parts.complete:
        return beside + _kept_by_norms(layer, tokens, layer.parts.norms)
    if not layer.separate_norm and layer.parts.norms:
        # The first norm is counted with its output below.
        beside += _kept_by_norms(layer, tokens, layer.parts.norms[1:])
    norm = c * m * layer.width
    if layer.fused_norm:
        # The norm's input in its own dtype and its deviations, with its output, which is X.
        norm = _read_by_norm(layer, tokens) + _FP32 * m
        if level == KEEP or not layer.separate_norm:
            norm += c * m * layer.width
    elif level == KEEP or not layer.separate_norm:
        # fp32 copy of the norm's input (or the fp32 residual), with its output, which is X.
        norm += _FP32 * m * (layer.width + 1)
    if level == RECOMPUTE and layer.two_streams:
        # Made again from the residual, and out_proj's output is not kept in its place.
        norm -= c * m * layer.width
    return norm + beside + _kept_by_mixer(layer, tokens, xz=level != RECOMPUTE)


def sent(layer: LayerShape, tokens: Tokens, level: str) -> int:
    """Bytes that wait in the host's memory from a block's forward to its backward."""
    return kept(layer, tokens, CHECKPOINT) if level == OFFLOAD else 0


def _beside(layer: LayerShape, tokens: Tokens) -> list[Part]:
    """What a block has beside its mixer, where all of it is known."""
    if not layer.parts.complete:
        return []
    return list(parts_beside(layer.parts, tokens, layer.width, layer.rank))


def _kept_by_norms(layer: LayerShape, tokens: Tokens, widths: tuple[int, ...]) -> int:
    """The input of each norm, as it is or copied to fp32, and its deviations."""
    size = tokens.itemsize if layer.fused_norm else _FP32
    return sum(tokens.count * (size * width + _FP32) for width in widths)


def _read_by_norm(layer: LayerShape, tokens: Tokens) -> int:
    """Of a norm's input: the fp32 residual itself where it is not rounded first."""
    fp32 = layer.separate_norm and not layer.rounds_input
    return (_FP32 if fp32 else tokens.itemsize) * tokens.count * layer.width


def _kept_by_mixer(layer: LayerShape, tokens: Tokens, *, xz: bool) -> int:
    m, c = tokens.count, tokens.itemsize
    inner, state = layer.inner, layer.state
    low_rank = c * m * padded_rank(layer.rank) if layer.rank else 0
    if layer.mixer == MAMBA:
        chunks = tokens.batch * -(-tokens.length // _SCAN_CHUNK)
        # States; A, D and dt's bias in fp32.
        scan = 2 * _FP32 * chunks * inner * state + _FP32 * inner * (state + 2)
        scan += _FP32 * inner * state if layer.trains_a else 0
        if layer.fused:
            # xz, x_proj's output, the ungated output, H of both projectors.
            dense = (layer.projected if xz else 0) + inner
            dbc = c * m * (layer.dt_rank + 2 * state)
            return c * m * dense + dbc + 2 * low_rank + scan
        # in_proj's output, contiguous u, delta, z, the ungated output, out_proj's input, its
        # output; the inputs of the norms of dt, B and C (x_proj's output, or fp32 copies of it),
        # their deviations, and contiguous B and C.
        mixer = c * m * (layer.projected + 5 * inner + layer.width)
        mixer += c * m * inner if layer.copies_convolved else 0
        read = (c if layer.fused_norm else _FP32) * m * (layer.dt_rank + 2 * state)
        norms = read + _FP32 * m * 3 + c * m * 2 * state
        return mixer + norms + 2 * low_rank + scan
    if layer.mixer == MAMBA2:
        if layer.fused:
            # zxbcdt, the ungated output, H of both projectors; the convolution and the states are
            # computed again. Of FalconH1, zxbcdt before and after its multipliers.
            copies = 2 if layer.scales_projection else 1
            return c * m * (copies * layer.projected + inner) + 2 * low_rank
        convolved = inner + 2 * layer.groups * state
        # zxbcdt, the convolution's in- and output, the scan's output, three of the gated norm in
        # fp32, out_proj's in- and output.
        plain = layer.projected + 2 * convolved + 2 * inner + layer.width
        return c * m * plain + 3 * _FP32 * m * inner + 2 * low_rank
    # Each linear layer's input, and about as much again for what lies between them.
    return c * m * sum(n + k for n, k in layer.weights)


def workspace(layer: LayerShape, tokens: Tokens, level: str) -> int:
    """Bytes of the largest moment within a block's backward, beyond what is kept."""
    m, c = tokens.count, tokens.itemsize
    again = forward = 0
    # The gradients of the residual and of the mixer's output, which are one in the same dtype.
    stream = ((_FP32 + c) if layer.fp32_residual else c) * m * layer.width
    beside = _beside(layer, tokens)
    if level in (CHECKPOINT, OFFLOAD):
        # The block's forward has run again and left behind what it keeps at the first level.
        again = kept(layer, tokens, KEEP)
        if level == OFFLOAD:
            # The input has come back, and the one before it is on its way.
            again += 2 * kept(layer, tokens, CHECKPOINT)
        if layer.fused_norm and (layer.separate_norm or not layer.fp32_residual):
            # It reads what is kept between forward and backward, and copies it no more.
            again -= _read_by_norm(layer, tokens)
        parallel = layer.mixer != OTHER and layer.parts.attention is not None
        # The end of that forward; with two mixers side by side, what each gives is there still.
        forward = max((part.forward for part in beside), default=0)
        forward += stream + (3 * c * m * layer.width if parallel else 0)
    elif level == RECOMPUTE:
        # in_proj's output and its input.
        again = c * m * (layer.projected + layer.width)
    elif level == NORM and layer.fused:
        again = c * m * layer.width
    moments, freed = [forward], 0
    for part in beside:
        released = part.released if level in (CHECKPOINT, OFFLOAD) else 0
        moments.append(stream + part.backward - freed - released)
        freed += part.kept
    if layer.mixer != OTHER:
        # The norms after the mixer's.
        freed += _kept_by_norms(layer, tokens, layer.parts.norms[1:])
    if layer.mixer != OTHER or not beside:
        moments.append(_backward_of_mixer(layer, tokens, stream) - freed)
    norm = _backward_of_norm(layer, tokens)
    if layer.mixer in (MAMBA, MAMBA2):
        # What the mixer kept has gone before.
        norm -= _kept_by_mixer(layer, tokens, xz=level != RECOMPUTE)
    return again + max(*moments, norm - freed)


def _backward_of_norm(layer: LayerShape, tokens: Tokens) -> int:
    if layer.fused_norm:
        # Gradients towards the residual, the norm's output, its input, and that in fp32.
        return 2 * (_FP32 + tokens.itemsize) * tokens.count * layer.width
    # Gradients towards residual and norm, and three fp32 products of the norm's formula.
    return 5 * _FP32 * tokens.count * layer.width


def _backward_of_mixer(layer: LayerShape, tokens: Tokens, stream: int) -> int:
    m, c = tokens.count, tokens.itemsize
    inner, state = layer.inner, layer.state
    weight = _weight_workspace(layer, tokens, layer.projected, layer.width)
    if layer.mixer == MAMBA and not layer.fused:
        return _backward_of_separate_kernels(layer, tokens)
    if layer.mixer == MAMBA:
        # The gated output's gradient, u, delta and their gradients, dxz; dB and dC in fp32.
        scan = c * m * (5 * inner + layer.projected) + 2 * _FP32 * m * state
        scan += _prefetched(layer, tokens)
        # dxz, X's gradient, and X where it is not kept but made again from the residual.
        project = c * m * (layer.projected + (1 + layer.two_streams) * layer.width) + weight
        return stream + max(scan, project)
    if layer.mixer == MAMBA2:
        convolved = inner + 2 * layer.groups * state
        chunks = tokens.batch * -(-tokens.length // layer.chunk)
        states = chunks * inner * state * (2 * _FP32 + 2 * c)
        products = chunks * layer.groups * layer.chunk**2 * 2 * _FP32
        # The gradient from out_proj and of the norm, the convolution's output and its gradient.
        scan = c * m * (2 * inner + 2 * convolved + layer.projected) + states + products
        if layer.two_streams:
            scan += _prefetched(layer, tokens)
        project = c * m * (layer.projected + (1 + layer.two_streams) * layer.width) + weight
        return stream + max(scan, project)
    widest = max((n + k for n, k in layer.weights), default=0)
    n, k = max(layer.weights, key=lambda shape: shape[0] * shape[1], default=(0, 0))
    return stream + 2 * c * m * widest + _weight_workspace(layer, tokens, n, k)


def _backward_of_separate_kernels(layer: LayerShape, tokens: Tokens) -> int:
    """Of Mamba-1 by one autograd node after another: each frees what it kept when it is done."""
    m, c = tokens.count, tokens.itemsize
    inner, width = layer.inner, layer.width
    residual = _FP32 * m * width
    # The gradient of the mixer's output, and that of out_proj's input.
    out_proj = c * m * (width + inner) + _weight_workspace(layer, tokens, width, inner)
    freed = c * m * (inner + width)
    # That gradient, copied where the projector does not give it with the tokens side by side, and
    # those of u, delta and z; dB and dC in fp32.
    direct = layer.rank and direct_length(tokens.length) and not tokens.in_fp8
    copies = 0 if direct else 1
    scan = c * m * (4 + copies) * inner + 2 * _FP32 * m * layer.state - freed
    # u, delta, z and the ungated output are gone too. The gradient of in_proj's output is put
    # together and transposed; then X's is made, and X again where it is not kept.
    freed += c * m * 4 * inner
    weight = _weight_workspace(layer, tokens, layer.projected, width)
    in_proj = c * m * ((1 + copies) * layer.projected + 2 * width) + weight - freed
    return residual + max(out_proj, scan, in_proj)


def _prefetched(layer: LayerShape, tokens: Tokens) -> int:
    """in_proj's scaled weight, and its input where that is made again: there before the scan."""
    weight = layer.projected * layer.width
    if not layer.rank or tokens.dense_weight or weight < LEAST_PREFETCHED:
        return 0
    return tokens.itemsize * (weight + layer.two_streams * tokens.count * layer.width)


def _weight_workspace(layer: LayerShape, tokens: Tokens, n: int, k: int) -> int:
    """What is scaled for dX, the dequantised weight, and sums in parts of its adapter's gradients.

    Scaled is s ⊙ W, whole or in panels, or a part of dY, as backward's plan has it. In fp8 the
    transposed codes, X or dY as it was rounded, with a scale for 128 elements, and the
    parts of T.
    """
    r_pad = padded_rank(layer.rank) if layer.rank else 0
    if layer.rank and tokens.in_fp8:
        # A split of the tokens is 16 of them at least.
        outputs = min(_SPLITS, -(-tokens.count // 16))
        partial = _FP32 * r_pad * (outputs * n + _SPLITS * k)
        t_parts = tokens.count * _FP32 * r_pad * n // 128 if r_pad <= 32 else 0
        return n * k + tokens.count * max(n, k) * 33 // 32 + t_parts + partial
    unpacked = tokens.itemsize * n * k if tokens.dense_weight else 0
    if not layer.rank:
        return unpacked
    channel_first = layer.mixer == MAMBA
    plan = choose_backward(
        tokens.count, n, k, r_pad, wants_t=True, output_side=True, through_weight=True, bias=False,
        channel_first=False, limits=tokens.limits, scales="weight" if channel_first else "either",
    )  # fmt: skip
    if _prefetched(layer, tokens):
        scaled = n * k
    elif plan.token_parts:
        # Rows of dX that are not written yet hold it where there are enough; behind the last, none.
        scaled = max(
            rows * n
            for first, rows in plan.token_parts
            if (tokens.count - first - rows) * k < rows * n
        )
    else:
        scaled = n * max(width for _, width in plan.panels)
    walk = plan.output_side
    outputs = max(1, walk.items // -(-n // walk.block_n))
    if channel_first and not layer.fused:
        # On separate kernels a backward takes more than what is counted: a bound, as measured.
        outputs = _SPLITS
    return unpacked + tokens.itemsize * scaled + _FP32 * r_pad * (outputs * n + _SPLITS * k)
