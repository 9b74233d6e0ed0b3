"""A plain copy, which reads and writes memory as fast as a kernel can."""

import triton
import triton.language as tl
from torch import Tensor

# Elements that a program copies, and its warps: the fastest of eight on an H200 by 1 to 5%.
BLOCK, WARPS = 1024, 8


@triton.jit
def _copy_kernel(source_ptr, target_ptr, length, BLOCK: tl.constexpr):
    """Target [length] = source [length]; a program owns BLOCK elements."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < length
    tl.store(target_ptr + offs, tl.load(source_ptr + offs, mask=inside), mask=inside)


def launch_copy(source: Tensor, target: Tensor) -> None:
    """Copy ``source`` to ``target``, contiguous and of one size and dtype."""
    length = source.numel()
    _copy_kernel[(triton.cdiv(length, BLOCK),)](
        source, target, length, BLOCK=BLOCK, num_warps=WARPS
    )
