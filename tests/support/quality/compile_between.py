"""Compiles for a Hopper, without one, the kernels of rows that train side by side."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.quality.side_by_side.fused import _Between
from support.kernels.launch_recorder import DEVICES, Recorder

RUNS, BATCH, LENGTH, HEADS, HEAD, STATES = 2, 2, 16, 2, 16, 16


def record() -> None:
    inner, channels = HEADS * HEAD, HEADS * HEAD + 2 * STATES
    shapes = [
        (RUNS, BATCH, LENGTH, 2 * inner + 2 * STATES + HEADS), (1, channels, 1, 4), (1, channels),
        (1, HEADS), (1, HEADS), (1, HEADS), (1, inner),
    ]  # fmt: skip
    tensors = [torch.empty(*shape, device="cuda") for shape in shapes]
    # By hand: autograd's engine has no device that is not there.
    context: Any = SimpleNamespace(save_for_backward=lambda *kept: setattr(context, "kept", kept))
    out = _Between.forward(context, *tensors, STATES, 1e-5)
    context.saved_tensors = context.kept
    _Between.backward(context, out)


def main() -> int:
    recorder = Recorder()
    with recorder.on(DEVICES[90]):
        record()
    for launch in recorder.launches:
        triton.compile(launch.source, target=GPUTarget("cuda", 90, 32), options=launch.options)
    found = {launch.kernel for launch in recorder.launches}
    print(f"{len(recorder.launches)} launches of {', '.join(sorted(found))}")
    return 0 if len(found) == 7 else 1


if __name__ == "__main__":
    sys.exit(main())
