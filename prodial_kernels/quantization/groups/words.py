"""Codes of few bits within wider words, as they are stored and as other libraries store them.

Everywhere the first code is in the lowest bits. Other libraries use words of 32 bits, in which
codes of 3, 5, 6 or 7 bits may lie across two words; here a row of codes is bytes, and a code has 2,
4 or 8 bits, so that it is in one of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTHS = (2, 4, 8)
_WORD = 32


def width_of(bits: int) -> int:
    """Bits that a code of ``bits`` is stored in; ValueError for more than 8."""
    fitting = [width for width in WIDTHS if width >= bits]
    if bits < 1 or not fitting:
        raise ValueError(f"codes must have 1 to {WIDTHS[-1]} bits, got {bits}")
    return fitting[0]


def pack(codes: Tensor, width: int) -> Tensor:
    """[N, K] uint8 codes -> [N, ⌈K · width / 8⌉] uint8; what fills the last byte is 0."""
    per_byte = 8 // width
    if per_byte == 1:
        return codes.contiguous()
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_byte))
    packed = padded[:, ::per_byte].clone()
    for place in range(1, per_byte):
        packed |= padded[:, place::per_byte] << (width * place)
    return packed


def unpack(packed: Tensor, width: int, count: int) -> Tensor:
    """[N, bytes] uint8 -> the first ``count`` codes of each row [N, count] uint8."""
    if width == 8:
        return packed[:, :count]
    mask = (1 << width) - 1
    parts = [(packed >> shift) & mask for shift in range(0, 8, width)]
    return torch.stack(parts, dim=-1).view(len(packed), -1)[:, :count]


def from_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes without gaps in rows of int32 words [N, ⌈count · bits / 32⌉] -> [N, count] uint8."""
    if bits in WIDTHS:
        return unpack(words.contiguous().view(torch.uint8), bits, count)
    wide = words.long() & 0xFFFFFFFF
    wide = torch.nn.functional.pad(wide, (0, 1))
    first = torch.arange(count, device=words.device) * bits
    word, shift = first // _WORD, first % _WORD
    both = wide[:, word] | (wide[:, word + 1] << _WORD)
    return ((both >> shift) & ((1 << bits) - 1)).to(torch.uint8)


def to_words(codes: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`from_words`: [N, count] uint8 -> [N, ⌈count · bits / 32⌉] int32."""
    rows, count = codes.shape
    first = torch.arange(count, device=codes.device) * bits
    word, shift = first // _WORD, first % _WORD
    total = -(-count * bits // _WORD)
    wide = torch.zeros(rows, total + 1, dtype=torch.int64, device=codes.device)
    # Bits of different codes never meet, so that a sum is an "or".
    spread = codes.long() << shift
    wide.index_add_(1, word, spread & 0xFFFFFFFF)
    wide.index_add_(1, word + 1, spread >> _WORD)
    words = wide[:, :total]
    return torch.where(words >= 1 << (_WORD - 1), words - (1 << _WORD), words).to(torch.int32)
