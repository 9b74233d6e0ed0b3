"""Compiles recorded launches to machine code, without a GPU, and reads what it costs.

``python tests/kernels/compile_launches.py --arch 90 --cover all`` prints a line for every launch
that breaks a rule; ``--json FILE`` keeps the figures of every launch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from launch_matrix import matrix, record
from launch_recorder import DEVICES, Launch, Recorder
from triton.backends.compiler import GPUTarget

# An asynchronous warp-group product is written "wgmma.mma_async<shape> {sums}, A, B, ...": A is a
# register list or the descriptor of a tile in shared memory.
WGMMA = re.compile(r"wgmma\.mma_async\S*\s*\{[^}]*\}\s*,\s*(\S)")


@dataclass
class Cost:
    """What one launch takes of the device.

    Attributes:
        title: The kernel and its constants.
        kernel: Its name.
        arch: Compute capability, 10 * major + minor.
        origin: The projector that asks for it.
        registers: Per thread.
        local: Bytes of local memory per thread: spilled registers.
        shared: Bytes of shared memory per program.
        shared_limit: What the device has of it.
        scratch: Bytes of global scratch memory, for which Triton would need an allocator.
        wgmma: Asynchronous warp-group products (Hopper).
        register_a: Of these, those with operand A in registers.
        error: Why it did not compile, else empty.
    """

    title: str
    kernel: str
    arch: int
    origin: str
    registers: int = 0
    local: int = 0
    shared: int = 0
    shared_limit: int = 0
    scratch: int = 0
    wgmma: int = 0
    register_a: int = 0
    error: str = ""


def cost_of(launch: Launch) -> Cost:
    """Compile one launch."""
    cost = Cost(launch.title, launch.kernel, launch.device.arch, str(launch.origin) or "default")
    cost.shared_limit = launch.device.shared_limit * 1024
    try:
        compiled = triton.compile(
            launch.source, target=GPUTarget("cuda", cost.arch, 32), options=launch.options
        )
    except Exception as error:
        # Reported with the rest: one launch that does not compile must not hide the others.
        cost.error = f"{type(error).__name__}: {str(error)[-400:]}"
        return cost
    operands = WGMMA.findall(compiled.asm["ptx"])
    cost.wgmma, cost.register_a = len(operands), operands.count("{")
    cost.shared = compiled.metadata.shared
    cost.scratch = compiled.metadata.global_scratch_size
    cost.registers, cost.local = resources(compiled.asm["cubin"])
    return cost


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread, from the machine code's own header."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        listing = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", listing)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no usage: {listing!r}")
    registers, stack, local = (int(figure) for figure in found.groups())
    return registers, stack + local


def weight(launch: Launch) -> int:
    """How much a launch holds on the chip, roughly: the largest are kept first."""
    sizes = [v for v in launch.constants.values() if isinstance(v, int) and not v < 2]
    flags = [v for v in launch.constants.values() if v is True]
    return sum(sizes) + 16 * len(flags)


def covering(launches: Iterable[Launch], pairs: bool) -> list[Launch]:
    """Choose launches so that every value of every constant of a kernel occurs.

    With ``pairs``, any two values that occur together somewhere, off switches aside, also occur
    together in the choice: the usual way to test combinations. The largest launches come first,
    so that each value is met where most else is on the chip.
    """
    seen: set[tuple[object, ...]] = set()
    chosen = []
    for launch in sorted(launches, key=weight, reverse=True):
        values = [(name, repr(v)) for name, v in launch.constants.items() if name.isupper()]
        values += [(name, str(launch.options[name])) for name in ("num_warps", "num_stages")]
        on = sorted(value for value in values if value[1] != "False")
        covers = {(launch.kernel, value) for value in [*values, ("dtype", launch.dtype)]}
        covers |= {(launch.kernel, *pair) for pair in itertools.combinations(on, 2) if pairs}
        if covers - seen:
            seen |= covers
            chosen.append(launch)
    return chosen


def select(arch: int, cover: str, quick: bool = False) -> list[Launch]:
    """Record the launches of the matrix on ``arch``.

    Args:
        arch: Key of ``DEVICES``.
        cover: ``"values"`` or ``"pairs"``, see :func:`covering`; ``"all"`` keeps every launch.
        quick: Of the matrix.
    """
    recorder = Recorder()
    with recorder.on(DEVICES[arch]):
        launches = record(recorder, matrix(quick))
    return launches if cover == "all" else covering(launches, pairs=cover == "pairs")


def compile_all(launches: list[Launch], jobs: int) -> list[Cost]:
    """Compile in ``jobs`` processes, which inherit the recorded launches."""
    # An executor rather than a pool: it notices a compiler that takes its process down.
    with ProcessPoolExecutor(
        jobs, multiprocessing.get_context("fork"), initializer=_inherit, initargs=(launches,)
    ) as executor:
        return list(executor.map(_cost_at, range(len(launches))))


_inherited: list[Launch] = []


def _inherit(launches: list[Launch]) -> None:
    _inherited[:] = launches


def _cost_at(index: int) -> Cost:
    return cost_of(_inherited[index])


def broken_rules(cost: Cost) -> list[str]:
    """Say what is wrong with a launch; what may stay is for the caller to decide."""
    if cost.error:
        return [cost.error]
    rules = []
    if cost.shared > cost.shared_limit:
        rules.append(f"{cost.shared} bytes of shared memory, the device has {cost.shared_limit}")
    if cost.local:
        rules.append(f"{cost.local} bytes of registers spilled per thread")
    if cost.scratch:
        rules.append(f"{cost.scratch} bytes of global scratch memory")
    if cost.register_a:
        rules.append(f"{cost.register_a} of {cost.wgmma} wgmma take A from registers")
    return rules


def main() -> None:
    """Compile, print what breaks a rule, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(DEVICES), default=[90])
    parser.add_argument("--cover", choices=("values", "pairs", "all"), default="pairs")
    parser.add_argument("--quick", action="store_true", help="fewer block sizes and ranks")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--projectors", type=Path, help="write the projectors here, compile none")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it")
    start = time.monotonic()
    launches = [
        launch
        for arch in options.arch
        for launch in select(arch, options.cover, options.quick)
        if options.kernel in launch.kernel
    ]
    if options.projectors:
        chosen = {launch.origin: launch.origin.as_json() for launch in launches}
        options.projectors.write_text(json.dumps(list(chosen.values())))
        return
    recorded = time.monotonic()
    costs = compile_all(launches, options.jobs)
    print(
        f"triton {triton.__version__}: recorded {len(launches)} launches in "
        f"{recorded - start:.0f} s, compiled them in {time.monotonic() - recorded:.0f} s"
    )
    for cost in costs:
        for rule in broken_rules(cost):
            print(f"{cost.title} [{cost.origin}]: {rule} ({cost.registers} registers)")
    if options.json:
        options.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=1))


if __name__ == "__main__":
    main()
