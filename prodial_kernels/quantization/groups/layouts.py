"""The layouts of GPTQ, AWQ, HQQ and compressed-tensors, read as :class:`GroupedLinear`, exactly.

| library | codes | zero points | scales |
|---|---|---|---|
| GPTQ (auto-gptq, gptqmodel) | ``qweight`` [K · bits / 32, N] int32, down the columns | \
``qzeros`` [S, N · bits / 32] int32; in version 1 less one | ``scales`` [S, N]; ``g_idx`` [K], a \
column's group |
| AWQ, ``gemm`` | ``qweight`` [K, N / 8] int32, eight rows interleaved | ``qzeros`` [S, N / 8], \
likewise | ``scales`` [S, N] |
| compressed-tensors, ``pack-quantized`` | ``weight_packed`` [N, K · bits / 32] int32 | \
``weight_zero_point`` [N · bits / 32, S] int32, or none | ``weight_scale`` [N, S] |
| HQQ | ``W_q``, rows of groups, halves or quarters of them in one byte | ``zero``, in floating \
point | ``scale`` |

None of the libraries is imported. ValueError for what is not one of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prodial_kernels.quantization.groups.layer import GroupedLinear, packed_codes
from prodial_kernels.quantization.groups.words import WIDTHS, from_words, to_words, unpack
from prodial_kernels.quantization.layer import check_scales

_WORD = 32
# Of AWQ: which of eight rows a place in a word holds, from the lowest bits on.
_AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)


def from_gptq(
    entries: Mapping[str, Tensor], bits: int, *, version: int, bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> GroupedLinear:  # fmt: skip
    """Read ``qweight``, ``qzeros``, ``scales`` and, where it is there, ``g_idx``.

    Args:
        entries: Those of a layer. KeyError where one is missing.
        bits: 2, 3, 4 or 8.
        version: 1 where zero points are stored less one (``checkpoint_format`` ``"gptq"``), 2 where
            they are not (``"gptq_v2"``).
        bias: The layer's.
        dtype: What to compute in; default: that of the scales.
    """
    words, zero_words, scales = entries["qweight"], entries["qzeros"], entries["scales"]
    _check_words(qweight=words, qzeros=zero_words)
    check_scales("scales", scales)
    groups, n = _two(scales, "scales")
    k = words.shape[0] * _WORD // bits
    order = entries.get("g_idx")
    if order is not None and order.numel():
        k = order.numel()
    shapes = ([-(-k * bits // _WORD), n], [groups, -(-n * bits // _WORD)])
    if [*words.shape] != shapes[0] or [*zero_words.shape] != shapes[1]:
        raise ValueError(
            f"of GPTQ in {bits} bits, scales {list(scales.shape)} and {k} columns, qweight must be "
            f"{shapes[0]} and qzeros {shapes[1]}; got {list(words.shape)}, {list(zero_words.shape)}"
        )
    codes = from_words(words.t(), bits, k)
    zeros = from_words(zero_words, bits, n).t()
    if version == 1:
        # What was stored as the largest code is 0 again, as in auto-gptq.
        zeros = (zeros + 1) & ((1 << bits) - 1)
    columns, order = _plain_order(order, k, groups)
    return _grouped(codes, scales.t(), zeros, bits, columns, order, bias, dtype)


def from_awq(
    entries: Mapping[str, Tensor], *, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> GroupedLinear:
    """Read ``qweight``, ``qzeros`` and ``scales`` of the ``gemm`` layout; as :func:`from_gptq`."""
    words, zero_words, scales = entries["qweight"], entries["qzeros"], entries["scales"]
    _check_words(qweight=words, qzeros=zero_words)
    check_scales("scales", scales)
    groups, n = _two(scales, "scales")
    k = words.shape[0]
    packed = n // 8
    if n % 8 or k % groups or [*words.shape, *zero_words.shape] != [k, packed, groups, packed]:
        raise ValueError(
            f"of AWQ's gemm layout, with scales {list(scales.shape)}, qweight must be "
            f"[in_features, {packed}] and qzeros {[groups, packed]}; got {list(words.shape)} and "
            f"{list(zero_words.shape)}: other layouts (gemv, marlin, …) are not read"
        )
    codes = _in_order(from_words(words, 4, n)).t()
    zeros = _in_order(from_words(zero_words, 4, n)).t()
    return _grouped(codes, scales.t(), zeros, 4, k // groups, None, bias, dtype)


def from_compressed_tensors(
    entries: Mapping[str, Tensor], bits: int, *, bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> GroupedLinear:  # fmt: skip
    """Read ``weight_packed``, ``weight_scale``, ``weight_shape`` and ``weight_zero_point``.

    Groups are as many as ``weight_scale`` has columns, or one for all. As :func:`from_gptq`.
    """
    words, scales, shape = (entries[f"weight_{name}"] for name in ("packed", "scale", "shape"))
    _check_words(weight_packed=words)
    check_scales("weight_scale", scales)
    n, k = (int(size) for size in shape.tolist())
    scales = scales.reshape(1, 1) if scales.numel() == 1 else scales
    repeats, groups = _two(scales, "weight_scale")
    if [*words.shape] != [n, -(-k * bits // _WORD)] or repeats not in (1, n) or k % groups:
        raise ValueError(
            f"of compressed-tensors in {bits} bits, weight_shape {[n, k]} wants weight_packed "
            f"{[n, -(-k * bits // _WORD)]} and weight_scale [{n}, groups]; got {list(words.shape)} "
            f"and {list(scales.shape)}"
        )
    if "weight_g_idx" in entries:
        raise ValueError("compressed-tensors with weight_g_idx (actorder='group') is not read")
    zeros = entries.get("weight_zero_point")
    if zeros is not None:
        _check_words(weight_zero_point=zeros)
        if [*zeros.shape] != [-(-repeats * bits // _WORD), groups]:
            raise ValueError(
                f"weight_zero_point must be [{-(-repeats * bits // _WORD)}, {groups}], got "
                f"{list(zeros.shape)}"
            )
        zeros = from_words(zeros.t(), bits, repeats).t()
    middle = 1 << (bits - 1)
    if bits in WIDTHS:
        # Their words are the bytes that are stored here: shared, where nothing fills a row up.
        stored = words.contiguous().view(torch.uint8)[:, : -(-k * bits // 8)].contiguous()
    else:
        stored = packed_codes(from_words(words, bits, k), bits)
    return GroupedLinear(
        k, n, bias, scales.dtype if dtype is None else dtype, codes=stored,
        scales=scales.contiguous(), zeros=None if zeros is None else zeros.contiguous(),
        zero=middle, columns=k // groups, bits=bits,
    )  # fmt: skip


def from_hqq(
    packed: Tensor, meta: Mapping[str, Any], *, bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> GroupedLinear:  # fmt: skip
    """Read HQQ's ``W_q`` and ``meta``; as :func:`from_gptq`. Zero points stay floating point."""
    if meta.get("quant_scale") or meta.get("quant_zero") or "zero_scale" in meta:
        raise ValueError(
            "HQQ whose scales or zero points are quantised or on the host (quant_scale, "
            "quant_zero, offload_meta) is not read; quantise again with BaseQuantizeConfig's "
            "defaults for these"
        )
    form, axis = meta["packing"], int(meta["axis"])
    n, k = (int(size) for size in meta["shape"])
    scales, zeros = meta["scale"], meta["zero"]
    for name, tensor in (("scale", scales), ("zero", zeros)):
        check_scales(name, tensor)
    bits = {"8bit_u8": 8, "4bit_u8": 4, "3bit_32": 3, "2bit_u8": 2, "1bit_u8": 1}.get(form)
    if bits is None:
        raise ValueError(f"HQQ packed as {form!r} is not read")
    if packed.is_floating_point():
        packed = packed.view(meta["unpack_view_dtype"])
    rows = _unstacked(packed, bits)
    count = n * k // rows.shape[1]
    codes = rows[:count].reshape(n, k)
    groups = scales.numel()
    if groups == 1:
        repeats, columns = 1, k
    elif axis == 1:
        # Groups of values in a row of the matrix, as they follow each other.
        repeats, columns = n, n * k // groups
        fits = k % columns == 0
    else:
        # Groups of values n · k / size apart, which are in one column where that is whole rows.
        repeats, columns = groups // k, 1
        fits = groups % k == 0 and n % max(repeats, 1) == 0
    if groups > 1 and not fits:
        raise ValueError(
            f"HQQ with groups that do not divide the rows (axis={axis}) of a weight {[n, k]} in "
            f"{groups} groups is not read; quantise again with a group_size that divides them"
        )
    return GroupedLinear(
        k, n, bias, scales.dtype if dtype is None else dtype, codes=packed_codes(codes, bits),
        scales=scales.reshape(repeats, -1).contiguous(),
        zeros=zeros.reshape(repeats, -1).contiguous(), columns=columns, bits=bits,
    )  # fmt: skip


def to_gptq(layer: GroupedLinear, version: int) -> dict[str, Tensor]:
    """What :func:`from_gptq` reads, but for ``g_idx``, which stays what it was."""
    zeros = _zeros(layer)
    if version == 1:
        zeros = (zeros - 1) & ((1 << layer.bits) - 1)
    return {
        "qweight": to_words(_codes(layer), layer.bits).t().contiguous(),
        "qzeros": to_words(zeros.t(), layer.bits),
        "scales": layer.scales.t().contiguous(),
    }


def to_awq(layer: GroupedLinear) -> dict[str, Tensor]:
    """What :func:`from_awq` reads."""
    return {
        "qweight": to_words(_interleaved(_codes(layer).t()), 4),
        "qzeros": to_words(_interleaved(_zeros(layer).t()), 4),
        "scales": layer.scales.t().contiguous(),
    }


def to_compressed_tensors(layer: GroupedLinear) -> dict[str, Tensor]:
    """What :func:`from_compressed_tensors` reads, but for ``weight_shape``, which stays."""
    entries = {
        "weight_packed": to_words(_codes(layer), layer.bits),
        "weight_scale": layer.scales,
    }
    if layer.zeros is not None:
        words = to_words(layer.zeros.t(), layer.bits)
        entries["weight_zero_point"] = words.t().contiguous()
    return entries


def _codes(layer: GroupedLinear) -> Tensor:
    return unpack(layer.codes, layer.width, layer.in_features)


def _zeros(layer: GroupedLinear) -> Tensor:
    """Zero points [N, S] uint8, also where they are one number."""
    if layer.zeros is not None:
        return layer.zeros
    return torch.full_like(layer.scales, layer.zero, dtype=torch.uint8)


def _grouped(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, columns: int, order: Tensor | None,
    bias: Tensor | None, dtype: torch.dtype | None,
) -> GroupedLinear:  # fmt: skip
    """A layer of codes [N, K] and zero points [N, S]; symmetric ones are stored as one number."""
    first = int(zeros[0, 0])
    same = bool((zeros == first).all())
    return GroupedLinear(
        codes.shape[1], len(codes), bias, scales.dtype if dtype is None else dtype,
        codes=packed_codes(codes, bits), scales=scales.contiguous(),
        zeros=None if same else zeros.contiguous(), zero=first if same else 0, order=order,
        columns=columns, bits=bits,
    )  # fmt: skip


def _plain_order(order: Tensor | None, k: int, groups: int) -> tuple[int, Tensor | None]:
    """Columns of a group, and ``g_idx`` where groups are not columns in a row."""
    columns = -(-k // groups)
    if order is None or not order.numel():
        return columns, None
    if not 0 <= int(order.min()) <= int(order.max()) < groups:
        raise ValueError(f"g_idx must be groups below {groups}, got up to {int(order.max())}")
    for size in {columns, 1 << (columns - 1).bit_length(), k}:
        if torch.equal(order.cpu(), torch.arange(k, dtype=order.dtype) // size):
            return size, None
    return columns, order.to(torch.int32)


def _in_order(codes: Tensor) -> Tensor:
    """[m, N] as AWQ's words hold them -> in the order of the rows of the weight."""
    places = torch.tensor(_AWQ_PLACES, device=codes.device).argsort()
    return codes.reshape(len(codes), -1, 8)[:, :, places].flatten(1)


def _interleaved(codes: Tensor) -> Tensor:
    """The inverse of :func:`_in_order`."""
    return codes.reshape(len(codes), -1, 8)[:, :, list(_AWQ_PLACES)].flatten(1)


def _unstacked(packed: Tensor, bits: int) -> Tensor:
    """HQQ's rows: the first part of them in the highest bits of a byte, or of 30 in 32 bits."""
    if bits == 8:
        return packed.to(torch.uint8)
    per_word = 10 if bits == 3 else 8 // bits
    shifts = [bits * place for place in reversed(range(per_word))]
    mask = (1 << bits) - 1
    return torch.cat([((packed >> shift) & mask).to(torch.uint8) for shift in shifts])


def _check_words(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32 or tensor.ndim != 2:
            raise ValueError(
                f"{name} must be a matrix of int32 words, got {list(tensor.shape)} {tensor.dtype}"
            )


def _two(tensor: Tensor, name: str) -> tuple[int, int]:
    if tensor.ndim != 2 or not tensor.numel():
        raise ValueError(f"{name} must be a matrix, got shape {list(tensor.shape)}")
    return tensor.shape[0], tensor.shape[1]
