"""Every kernel once or twice on small tensors, for a memory or race checker to watch.

    compute-sanitizer --tool memcheck --error-exitcode 9 python -m tests.support.sanitize
    compute-sanitizer --tool racecheck --error-exitcode 9 python -m tests.support.sanitize
    compute-sanitizer --tool initcheck --error-exitcode 9 python -m tests.support.sanitize

compute-sanitizer comes with the CUDA toolkit (``/usr/local/cuda/bin``); no wheel carries it. Every
tensor gets an allocation of its own here, so that a step past its end is a step out of bounds, and
results are compared with plain PyTorch only coarsely: the tests do that better. That runs on the
CPU, because racecheck finds hazards in cuBLAS's own kernels (``nvjet_…``), whose clusters wait for
each other unseen; ranks above 64 without dropout call those all the same.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, fields, replace

# Before torch is loaded: with the caching allocator, neighbours hide what leaves a tensor.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

from prodial_kernels import prodial_linear
from prodial_kernels.testing import LinearCase, make_case


@dataclass(frozen=True)
class Run:
    """Sizes of one projector; ragged against every tile, and small, for a checker is slow."""

    name: str
    m: int
    k: int
    n: int
    block_size: int
    r: int
    dropout: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    bias: bool = True


RUNS = (
    Run("copy engine, ragged tiles, P = 1", 200, 200, 328, 1, 16),
    Run("copy engine, more than a wave of tiles", 1200, 192, 4224, 12, 16),
    Run("columns among the others", 2048, 64, 8512, 1, 16),
    Run("sums among the product's programs", 1024, 2048, 1032, 1, 16, bias=False),
    Run("sums beside the input side", 2048, 768, 1536, 1, 64, bias=False),
    Run("the gradient scaled in parts", 1100, 4096, 520, 1, 16, bias=False),
    Run("a weight that is nothing beside its activations", 4100, 192, 272, 12, 16),
    Run("few small tiles", 300, 264, 3000, 1, 16),
    Run("pointers, odd sizes", 77, 66, 67, 6, 5),
    Run("dropout, blocks that straddle tiles", 130, 144, 136, 48, 17, dropout=0.25),
    Run("rank beside the product, widest blocks", 65, 256, 72, 128, 100),
    Run("widest rank, fp16", 40, 96, 88, 24, 256, dtype=torch.float16),
    Run("one token", 1, 96, 80, 6, 8),
)


def run(sizes: Run) -> None:
    """Forward and backward with every part, and with a scale that takes the exact path."""
    case = make_case(
        sizes.m, sizes.k, sizes.n, block_size=sizes.block_size, r=sizes.r, device="cuda"
    )
    if not sizes.bias:
        case = replace(case, bias=None)
    if case.scale is not None:
        case.scale[::3] = 0.0
    case = case.cast(sizes.dtype, torch.float32)

    def kernels(c: LinearCase) -> torch.Tensor:
        return prodial_linear(
            c.x, c.weight, blocks=c.blocks, scale=c.scale, lora_a=c.lora_a, lora_b=c.lora_b,
            bias=c.bias, lora_scaling=c.lora_scaling, lora_dropout=sizes.dropout, training=True,
            diagonal=c.diagonal, impl="triton",
        )  # fmt: skip

    result = case.run(kernels)
    torch.cuda.synchronize()
    if sizes.dropout:
        return
    on_cpu = {f.name: getattr(case, f.name) for f in fields(case)}
    on_cpu = {name: v.cpu() if isinstance(v, torch.Tensor) else v for name, v in on_cpu.items()}
    for name, expected in replace(case, **on_cpu).run(LinearCase.reference).items():
        error = float((result[name].cpu().float() - expected.float()).abs().max())
        largest = float(expected.float().abs().max())
        if not error <= 0.05 * largest:
            raise RuntimeError(f"{sizes.name}: {name} is off by {error:.3g} of {largest:.3g}")


def main() -> int:
    """Run everything; return 0."""
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    for sizes in RUNS:
        run(sizes)
        print(f"ran {sizes.name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
