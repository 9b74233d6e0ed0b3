"""Programmatic dependent launch (PDL): a kernel that starts while the one before it drains.

A launch otherwise starts when the last program of the launch before it has ended. Where that one
triggers it and this one is launched with PDL, its programs become resident meanwhile and wait on
the device for the other's results, which saves most of the time between the two. Only a launch that
directly follows in the same stream can be: behind a join it would wait for another stream as well.
"""

from typing import Any

import triton
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def trigger_next():
    """Allow the next launch, if it is a PDL launch, to start once all programs here have."""
    gdc_launch_dependents()


@triton.jit
def wait_for_previous():
    """Wait until the launch before has ended and its results are in memory."""
    gdc_wait()


def supports_pdl(capability: tuple[int, int], operand: Tensor) -> bool:
    """Whether launches on ``operand`` may use PDL: on a Hopper, where it is measured to pay."""
    return capability[0] == 9 and operand.is_cuda


def pdl_options(pdl: bool) -> dict[str, Any]:
    """The launch options of a kernel that begins with :func:`wait_for_previous`."""
    return {"launch_pdl": True} if pdl else {}
