"""Writes down the launches of some projectors in order, and what they take together, as JSON.

python launch_order.py FILE
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from prodial_kernels.kernels.projector import (
    exact_scale,
    gemm,
    input_side,
    outer_product,
    output_side,
    passes,
    prepare,
    reduce,
)
from support.kernels.compile_launches import compile_launch, cost_of
from support.kernels.launch_matrix import Projector, record
from support.kernels.launch_recorder import DEVICES, Launch, Recorder, flat

BF16 = Projector(bias=False)
# Plans of every kind, and some without a launch that triggers another.
PROJECTORS = {
    "side by side": replace(BF16, k=1536, n=768),
    "co-resident": BF16,
    "co-resident, blocks": replace(BF16, block_size=48),
    "co-resident, wide tiles": replace(BF16, m=16384),
    "deferred": replace(BF16, r=64),
    "many tokens": replace(BF16, m=16384, k=1536, n=768),
    "column panels": replace(BF16, m=16384, k=2048, n=8192),
    "tail columns": replace(BF16, k=2048, n=8512),
    "channel-first X": replace(BF16, k=4096, n=2048, x_channel_first=True),
    "channel-first Y": replace(BF16, m=4096, k=768, n=1536, y_channel_first=True),
    "no LoRA, no blocks": replace(BF16, m=4096, k=1024, block_size=None, r=None),
    "only LoRA": replace(BF16, m=4096, k=1024, block_size=None, scale=False),
    "only s and B": replace(BF16, m=4096, k=1024, needs=(False, False, True, False, True, False)),
    "small weight": replace(BF16, m=8192, k=192, n=768),
    "small weight, only s": replace(
        BF16, m=8192, k=192, n=768, needs=(False, False, True) + (False,) * 3
    ),
    "one walk after another": replace(BF16, m=16384, k=768, block_size=96, r=64, dropout=True),
}


@dataclass
class Step:
    """A launch, or a fork or join of the side stream.

    Attributes:
        name: The kernel, or the edge.
        side: Whether it is on the side stream.
        triggers: Whether it triggers the next launch.
        pdl: Whether it is a PDL launch to the driver.
        waits: Whether the kernel then waits, before it begins.
        beside: Whether it waits at its end, and needs nothing of the launch before.
    """

    name: str
    side: bool = False
    triggers: bool = False
    pdl: bool = False
    waits: bool = False
    beside: bool = False


def steps_of(each: Projector, arch: int) -> list[Step]:
    """What forward and backward ask for, in order."""
    steps: list[Step] = []

    def seen(original: Callable[..., Any], step: Callable[..., Step]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            steps.append(step(*args, **named))
            return original(*args, **named)

        return call

    def launched(kernel: Any, *_: Any, side: Any = None, **named: Any) -> Step:
        constants = flat(named)
        return Step(
            kernel.__name__.removeprefix("_").removesuffix("_kernel"), side is not None,
            triggers=constants.get("TRIGGERS_NEXT", False), pdl=named.get("launch_pdl", False),
            waits=constants.get("PDL", False), beside=constants.get("BESIDE", False),
        )  # fmt: skip

    with ExitStack() as stack:
        for module in (
            exact_scale, gemm, input_side, output_side, prepare, reduce, outer_product,
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(module, "launch", seen(module.launch, launched)))
        for edge in ("fork", "join"):
            watched = seen(getattr(passes, edge), lambda *_, name=edge: Step(name))
            stack.enter_context(mock.patch.object(passes, edge, watched))
        recorder = Recorder()
        with recorder.on(DEVICES[arch]):
            record(recorder, iter([each]))
    return steps


def comes_first(instruction: str, launch: Launch) -> bool:
    """Whether a kernel's code has the instruction, and before it reads or writes memory."""
    ptx = str(compile_launch(launch).asm["ptx"])
    touched = re.search(r"\b(?:ld|st|cp\.async\S*)\.\S*global", ptx)
    assert touched is not None
    return 0 < ptx.find(instruction) < touched.start()


def launches_of(each: Projector) -> list[Launch]:
    """What a projector launches on a Hopper."""
    recorder = Recorder()
    with recorder.on(DEVICES[90]):
        return record(recorder, iter([each]))


# Of a Hopper's multiprocessor: CUDA C Programming Guide, "Technical Specifications per Compute
# Capability". Every program takes 1 KiB of shared memory besides its own.
REGISTERS, SHARED, RESERVED = 65536, 228 * 1024, 1024


def taken(launch: Launch) -> tuple[int, int]:
    """Registers and bytes of shared memory that one program takes of a multiprocessor."""
    cost = cost_of(launch)
    # Given out to warps, in units of 8 a thread.
    registers = -(-cost.registers // 8) * 8 * 32 * launch.options["num_warps"]
    return registers, cost.shared + RESERVED


def room_beside_product(each: Projector) -> dict[str, dict[str, int]]:
    """What a program of backward's product and one of each sum over the tokens leave, by kernel."""
    launches = {launch.kernel: launch for launch in launches_of(each)}
    product = launches["_gemm_kernel"]
    assert not product.constants["RIGHT_T"], "the last is backward's"
    registers, shared = taken(product)
    left = {}
    for kernel in ("_output_side_kernel", "_exact_scale_kernel"):
        more_registers, more_shared = taken(launches[kernel])
        left[kernel] = {
            "registers": REGISTERS - registers - more_registers,
            "shared": SHARED - shared - more_shared,
        }
    return left


def main(file: Path) -> None:
    """Write the steps by architecture and projector, and what the kernels' code does and takes."""
    orders = {
        str(arch): {
            name: [asdict(step) for step in steps_of(each, arch)]
            for name, each in PROJECTORS.items()
        }
        for arch in (80, 90, 100)
    }
    side_by_side = launches_of(PROJECTORS["side by side"])
    code = {
        name: {each.kernel: comes_first(f"griddepcontrol.{instruction}", each)
               for each in side_by_side if each.constants.get(flag)}
        for name, flag, instruction in (
            ("waits", "PDL", "wait"), ("triggers", "TRIGGERS_NEXT", "launch_dependents"),
        )
    }  # fmt: skip
    room = {
        f"{name}: {kernel}": left
        for name in ("co-resident", "co-resident, blocks", "co-resident, wide tiles")
        for kernel, left in room_beside_product(PROJECTORS[name]).items()
    }
    file.write_text(json.dumps({"orders": orders, "code": code, "room": room}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
