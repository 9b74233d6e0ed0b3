"""One of the processes that ``benchmarks.distributed`` starts: what it measures with the others.

``python -m benchmarks.training.processes PART FILE [--cases MODEL,…] [--tiny]``; the first process
writes rows to FILE, one JSON object a line, as they come.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

from benchmarks.harness.startup import prepare_process

prepare_process()
STARTED = time.perf_counter()

import torch  # noqa: E402

from benchmarks.training.scaling import scaling, sharded  # noqa: E402
from benchmarks.training.shared_gradients import gradients  # noqa: E402
from prodial_kernels.training.distributed.launch import Launch  # noqa: E402
from prodial_kernels.training.distributed.world import joined  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a part and write its rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.processes")
    parser.add_argument("part", choices=("gradients", "sharded", "scaling"))
    parser.add_argument("file")
    parser.add_argument("--cases", type=lambda words: words.split(","), default=[])
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    device = torch.device("cpu" if args.tiny else "cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    with joined(Launch.from_environment(), device) as world:
        device = torch.device("cuda", torch.cuda.current_device()) if not args.tiny else device
        if args.part == "gradients":
            measured = gradients(world, device, args.tiny, args.cases)
        else:
            part = {"sharded": sharded, "scaling": scaling}[args.part]
            measured = part(world, device, args.tiny)
        with open(args.file, "a", encoding="utf-8") as stream:
            for row in measured:
                if world.main:
                    stream.write(json.dumps(row) + "\n")
                    stream.flush()
                    print(f"{time.perf_counter() - STARTED:.1f} s", row, flush=True)


if __name__ == "__main__":
    main()
