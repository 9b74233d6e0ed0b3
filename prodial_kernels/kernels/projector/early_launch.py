"""Beginning a launch while the one before it ends: programmatic dependent launch.

A launch otherwise begins when the last program of the one before it has ended. Where that one
opens the way and this one is launched early, its programs take their places meanwhile and wait
there for the other's results, which spares most of the time between the two. Only a launch that
directly follows in the same stream is: behind a join it would wait for another stream as well.
"""

from typing import Any

import triton
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def open_way():
    """Let a launch that follows early take its place as soon as all programs of this one have."""
    gdc_launch_dependents()


@triton.jit
def wait_for_results():
    """Wait until the launch before has ended, its results in memory; at once if it has."""
    gdc_wait()


def overlaps(capability: tuple[int, int], operand: Tensor) -> bool:
    """Whether launches on ``operand`` may begin early: on a Hopper, where it is measured to pay."""
    return capability[0] == 9 and operand.is_cuda


def launched_early(early: bool) -> dict[str, Any]:
    """The options of a launch, of a kernel that begins with :func:`wait_for_results`."""
    return {"launch_pdl": True} if early else {}
