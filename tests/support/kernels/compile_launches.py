"""Compiles recorded launches to machine code, without a GPU, and reads what it costs.

``python tests/support/kernels/compile_launches.py --arch 90 --cover all`` prints a line for every
launch that breaks a rule; ``--json FILE`` keeps the figures of every launch.
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
from collections.abc import Iterable, Set
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from support.kernels.launch_matrix import matrix, record
from support.kernels.launch_recorder import DEVICES, Launch, Recorder

# An asynchronous warp-group product is written "wgmma.mma_async<shape> {sums}, A, B, ...": A is a
# register list or the descriptor of a tile in shared memory.
WGMMA = re.compile(r"wgmma\.mma_async\S*\s*\{[^}]*\}\s*,\s*(\S)")


# The kernels whose time goes into products of matrices.
PRODUCTS = {"_gemm_kernel", "_input_side_kernel", "_output_side_kernel", "_weight_side_kernel"}
# Those that Blackwell multiplies by its own instruction (tcgen05), of some size or other.
IN_TENSOR_MEMORY = PRODUCTS | {"_prepare_kernel", "_tile_sums_kernel", "_outer_product_kernel"}
# What the tests compile for, see :func:`select_for_all`. Beside a device, whose host has many
# cores, they cover "products" of its own.
HOPPER, BLACKWELL = 90, 100
# These get the same launches and multiply by the same instruction (mma.sync).
ALIKE = (80, 86, 89, 120)
CHECKED = (HOPPER, BLACKWELL, *ALIKE)


COVERS = ("kernels", "values", "products", "pairs", "triples", "all")


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
        tcgen05: Products in tensor memory (Blackwell).
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
    tcgen05: int = 0
    error: str = ""


def compile_launch(launch: Launch) -> triton.compiler.CompiledKernel:
    """Compile one launch for its device."""
    target = GPUTarget("cuda", launch.device.arch, 32)
    return triton.compile(launch.source, target=target, options=launch.options)


def cost_of(launch: Launch) -> Cost:
    """Compile one launch."""
    cost = Cost(launch.title, launch.kernel, launch.device.arch, str(launch.origin) or "default")
    cost.shared_limit = launch.device.shared_limit * 1024
    try:
        compiled = compile_launch(launch)
    except Exception as error:
        # Reported with the rest: one launch that does not compile must not hide the others.
        cost.error = f"{type(error).__name__}: {str(error)[-400:]}"
        return cost
    operands = WGMMA.findall(compiled.asm["ptx"])
    cost.wgmma, cost.register_a = len(operands), operands.count("{")
    cost.tcgen05 = compiled.asm["ptx"].count("tcgen05.mma")
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


@triton.jit
def _bad_kernel(x_ptr, w_ptr, y_ptr, SIDE: tl.constexpr):
    """Y = X W + (2 X) W with too few registers for it; X, W, Y [SIDE, SIDE]."""
    offs = tl.arange(0, SIDE)
    at = offs[:, None] * SIDE + offs[None, :]
    x, w = tl.load(x_ptr + at), tl.load(w_ptr + at)
    y = tl.dot(x, w) + tl.dot((x.to(tl.float32) * 2).to(x.dtype), w)
    tl.store(y_ptr + at, y * tl.load(y_ptr + at))


def bad_launch() -> Launch:
    """A launch that breaks the rules, to see that it is noticed."""
    recorder = Recorder()
    with recorder.on(DEVICES[90]):
        x = torch.empty(128, 128, dtype=torch.bfloat16, device="cuda")
        recorder.origin = "self-check"
        _bad_kernel[(1,)](x, x, x, SIDE=128, num_warps=4, maxnreg=96)
    (launch,) = recorder.launches
    return launch


def weight(launch: Launch) -> int:
    """How much a launch holds on the chip, roughly: the largest are kept first."""
    sizes = [v for v in launch.constants.values() if isinstance(v, int) and not v < 2]
    flags = [v for v in launch.constants.values() if v is True]
    return sum(sizes) + 16 * len(flags)


def covering(
    launches: Iterable[Launch], cover: str, covered: Set[tuple[object, ...]] = frozenset()
) -> list[Launch]:
    """Choose launches so that every value of every constant of a kernel occurs.

    What is too much for a device is seldom one constant alone, so ``"pairs"`` and ``"triples"``
    ask for values together, see :func:`covered_by`; ``"products"`` asks for pairs in the kernels
    that multiply matrices, and ``"kernels"`` for each kernel once. Greedy: the launch that brings
    the most comes first, among equals the one that holds the most on the chip. What is ``covered``
    already is not asked for.
    """
    new = ((covered_by(launch, cover) - covered, launch) for launch in launches)
    left = [(values, weight(launch), launch) for values, launch in new if values]
    chosen = []
    while left:
        left.sort(key=lambda item: (len(item[0]), item[1]))
        best, _, launch = left.pop()
        chosen.append(launch)
        left = [(new - best, heavy, other) for new, heavy, other in left if new - best]
    return chosen


# Operands whose absence makes a kernel another one.
OPTIONAL = {
    "inner", "outer", "low_ptr", "deviation_ptr", "bias_ptr", "blocks_ptr", "seed_ptr", "t_ptr",
    "v_ptr", "scaled_ptr", "a_out_ptr", "b_out_ptr", "exact_ptr", "partial_a_ptr", "partial_b_ptr",
    "partial_bias_ptr", "partial_e_ptr", "partial_scale_ptr",
}  # fmt: skip


def covered_by(launch: Launch, cover: str) -> set[tuple[object, ...]]:
    """What a launch covers: its values; any two that are not off; two sizes with a switch."""
    if cover == "kernels":
        return {(launch.kernel,)}
    if cover == "products":
        cover = "pairs" if launch.kernel in PRODUCTS else "values"
    values = [(name, repr(v)) for name, v in launch.constants.items() if name.isupper()]
    values += [(name, str(launch.options[name])) for name in ("num_warps", "num_stages")]
    covers: set[tuple[object, ...]] = {(launch.kernel, value) for value in values}
    covers.add((launch.kernel, launch.dtype))
    sizes = sorted(value for value in values if value[1] not in ("True", "False"))
    switches = sorted(value for value in values if value[1] == "True")
    switches += [
        (name, "given") for name, kind in sorted(launch.source.signature.items())
        if name in OPTIONAL and kind != "constexpr"
    ]  # fmt: skip
    if cover != "values":
        covers |= {(launch.kernel, *pair) for pair in itertools.combinations(sizes + switches, 2)}
    if cover == "triples":
        covers |= {
            (launch.kernel, *pair, switch)
            for pair in itertools.combinations(sizes, 2)
            for switch in switches
        }
    return covers


def select(arch: int, cover: str, quick: bool = False) -> list[Launch]:
    """Record the launches of the matrix on ``arch``.

    Args:
        arch: Key of ``DEVICES``.
        cover: See :func:`covering`; ``"all"`` keeps every launch.
        quick: Of the matrix.
    """
    recorder = Recorder()
    with recorder.on(DEVICES[arch]):
        launches = record(recorder, matrix(quick))
    return launches if cover == "all" else covering(launches, cover)


def covering_together(of_each: dict[int, list[Launch]]) -> list[Launch]:
    """Choose launches of every kernel for every architecture that cover all values together."""
    chosen: list[Launch] = []
    covered = set[tuple[object, ...]]()

    def gain(launch: Launch) -> tuple[int, int]:
        return len(covered_by(launch, "values") - covered), weight(launch)

    for launches in of_each.values():
        for kernel in {launch.kernel: None for launch in launches}:
            best = max((launch for launch in launches if launch.kernel == kernel), key=gain)
            chosen.append(best)
            covered |= covered_by(best, "values")
    return chosen + covering(next(iter(of_each.values())), "values", covered)


def select_for_all() -> list[Launch]:
    """The launches that the tests compile, for each of ``CHECKED``.

    Every value of every constant is compiled on Hopper, among those that are alike, and on
    Blackwell where a kernel multiplies by an instruction that no other has; each kernel is compiled
    for every architecture. The launchers know Hopper and the rest, so the whole matrix is recorded
    on the first of either; on the others, only the projectors whose launches cover every pair of
    constants there.

    Raises:
        RuntimeError: A device of the rest launches something else than the first.
    """
    first, *others = *ALIKE, BLACKWELL
    rest = select(first, "all", quick=True)
    telling = list({launch.origin: None for launch in covering(rest, "pairs")})
    covered = set[tuple[object, ...]]().union(*(covered_by(launch, "pairs") for launch in rest))
    of_each = {first: rest}
    for arch in others:
        recorder = Recorder()
        with recorder.on(DEVICES[arch]):
            of_each[arch] = record(recorder, iter(telling))
        if set().union(*(covered_by(launch, "pairs") for launch in of_each[arch])) != covered:
            raise RuntimeError(f"sm_{arch} launches otherwise than sm_{first}: record its matrix")
    blackwell = of_each.pop(BLACKWELL)
    own, others_too = [], []
    for launch in blackwell:
        (own if launch.kernel in IN_TENSOR_MEMORY else others_too).append(launch)
    return [
        *covering(select(HOPPER, "all", quick=True), "values"),
        *covering_together(of_each),
        *covering(own, "values"),
        *covering(others_too, "kernels"),
    ]


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
    parser.add_argument("--cover", choices=COVERS, default="triples")
    parser.add_argument("--quick", action="store_true", help="fewer block sizes and ranks")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--projectors", type=Path, help="write the projectors here, compile none")
    parser.add_argument(
        "--tests", action="store_true", help="what the tests compile, and a bad one"
    )
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it")
    start = time.monotonic()
    if options.tests:
        launches = [bad_launch(), *select_for_all()]
    else:
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
