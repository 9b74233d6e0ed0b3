"""A hash of every byte of a tensor: the same on every device, and without a copy from a GPU.

Eight bytes are a word w, 1,024 words a row. A row's sum is ``Σ m_j w_j + n_j (w_j >> 32)`` modulo
2^64 with fixed odd m_j and n_j, so any single change shows, and several cancel in one row with a
chance of about 2^-32 (the shifted term is there for the highest bits, which m_j cannot move). The
rows' sums, a thousandth of the tensor, go through SHA-256. A guard against mistakes and bit flips;
who wants to forge a model can.
"""

from __future__ import annotations

import ctypes
import hashlib
from functools import lru_cache

import torch
from torch import Tensor

_WORD = 8
_ROW = 1024
# Rows at a time: what fits a CPU's cache, and what keeps a GPU busy at 32 MB of temporaries.
_ROWS_ON_CPU, _ROWS_ELSEWHERE = 128, 4096
_DIGITS = 32


@torch.no_grad()
def hash_tensor(tensor: Tensor) -> str:
    """Return 32 hexadecimal digits of a dense tensor's dtype, shape and every byte, on any device.

    Bytes are those of the values in row-major order, so strides do not matter. On one core of a
    CPU some GB a second; elsewhere at the speed of the memory.
    """
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    data = tensor.detach()
    data = (torch.view_as_real(data) if data.is_complex() else data).contiguous()
    flat = data.reshape(-1)
    offset = flat.storage_offset() * flat.element_size()
    # A single value counts as contiguous whatever its stride; words begin at multiples of eight.
    if flat.stride(0) != 1 or offset % _WORD or flat.data_ptr() % _WORD:
        flat = torch.empty(flat.shape, dtype=flat.dtype, device=flat.device).copy_(flat)
    raw = flat.view(torch.uint8)
    whole = raw.numel() // _WORD * _WORD
    words = raw[:whole].view(torch.int64)
    rows = words.numel() // _ROW
    sums = [_row_sums(words[: rows * _ROW].view(rows, _ROW))]
    rest = torch.zeros(_ROW, dtype=torch.int64, device=words.device)
    rest[: words.numel() - rows * _ROW] = words[rows * _ROW :]
    sums.append(_row_sums(rest.view(1, _ROW)))
    on_host = torch.cat(sums).cpu()
    digest.update(ctypes.string_at(on_host.data_ptr(), on_host.nbytes))
    digest.update(bytes(raw[whole:].tolist()))
    return digest.hexdigest()[:_DIGITS]


def _row_sums(words: Tensor) -> Tensor:
    """Int64 [rows, 1024] -> int64 [rows]; integers wrap around."""
    low, high = _multipliers(words.device)
    on_cpu = words.device.type == "cpu"
    step = _ROWS_ON_CPU if on_cpu else _ROWS_ELSEWHERE
    sums = torch.empty(len(words), dtype=torch.int64, device=words.device)
    shifted = torch.empty_like(words[:step]) if on_cpu else words
    for first in range(0, len(words), step):
        piece, out = words[first : first + step], sums[first : first + step]
        if on_cpu:
            # Products of matrices of integers exist on CPUs only, where they are the fastest way.
            torch.mv(piece, low, out=out)
            out += torch.mv(torch.bitwise_right_shift(piece, 32, out=shifted[: len(piece)]), high)
        else:
            out.copy_((piece * low + (piece >> 32) * high).sum(1))
    return sums


@lru_cache
def _multipliers(device: torch.device) -> tuple[Tensor, Tensor]:
    """Two fixed vectors of odd 64-bit numbers, int64 [1024] (splitmix64)."""
    mask, state, numbers = 2**64 - 1, 0, []
    for _ in range(2 * _ROW):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        odd = (z ^ (z >> 31)) | 1
        numbers.append(odd - 2**64 if odd >= 2**63 else odd)
    with torch.inference_mode(False):
        both = torch.tensor(numbers, dtype=torch.int64, device=device)
    return both[:_ROW], both[_ROW:]
