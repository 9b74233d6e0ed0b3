"""A captured section as one node of autograd, whose forward and backward replay graphs."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors
from torch.autograd.function import once_differentiable

from prodial_kernels.captured.engine import Graphed, Section


class Pending:
    """Replayed forwards without their backward yet, in order."""

    def __init__(self) -> None:
        self._runs: list[weakref.ref[Run]] = []

    def __bool__(self) -> bool:
        """Whether there is one whose backward can still come: its node is alive."""
        while self._runs:
            last = self._runs[-1]()
            if last is not None and not last.done:
                return True
            self._runs.pop()
        return False

    def add(self, run: Run) -> None:
        """Add a replayed forward."""
        self._runs.append(weakref.ref(run))

    def finish(self, run: Run) -> None:
        """Remove a forward whose backward is about to be replayed.

        Raises:
            RuntimeError: The backward has run already, or that of another forward must come first.
        """
        if run.done:
            raise RuntimeError(
                f"a second backward through {run.section.name}, which is captured: what it kept is "
                "overwritten by the first. Release the captured blocks to use retain_graph=True"
            )
        last = self._runs[-1]() if self else None
        if last is not run:
            first = "another forward" if last is None else last.section.name
            raise RuntimeError(
                f"backward through {run.section.name}, which is captured, before that through "
                f"{first}, whose forward came later: it would overwrite what that one kept. Run "
                "one backward over the sum of the losses, or release the captured blocks"
            )
        self._runs.pop()
        run.done = True


@dataclass(eq=False)
class Run:
    """One replay of a section, and what its backward needs to know.

    Attributes:
        graphed: The graphs.
        section: What was captured.
        pending: Holds this replay until its backward.
        internal: For each leaf that requires a gradient, a reference to it if the section before
            returned it, else None. Once it is gone, only that section's graph reads its gradient,
            which then needs no copy.
        started: Whether the forward has been replayed already.
        given: What the forward's replay returned, for the backward's.
        done: Whether the backward has been replayed.
    """

    graphed: Graphed
    section: Section
    pending: Pending
    internal: Sequence[weakref.ref[Tensor] | None]
    started: bool = False
    given: Any = None
    done: bool = False


class Replay(torch.autograd.Function):
    """``(run, *leaves that require a gradient, *parameters) -> results``.

    Results are copied, so that a caller may keep them; so are gradients of parameters, which become
    ``.grad`` itself, to which a later backward adds.
    """

    @staticmethod
    def forward(ctx: Any, run: Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Replay the forward; the tensors only connect the node to its inputs."""
        if not run.started:
            run.given = run.graphed.forward()
        run.pending.add(run)
        ctx.run = run
        ctx.set_materialize_grads(False)
        results = tuple([result.clone() for result in run.graphed.results])
        gradients = run.graphed.result_gradients
        constant = [r for r, g in zip(results, gradients, strict=True) if g is None]
        if constant:
            ctx.mark_non_differentiable(*constant)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Replay the backward."""
        run: Run = ctx.run
        graphed, section = run.graphed, run.section
        run.pending.finish(run)
        for place, gradient in zip(graphed.result_gradients, gradients, strict=True):
            if place is None:
                continue
            if gradient is None:
                place.zero_()
            elif gradient.data_ptr() != place.data_ptr() or gradient.stride() != place.stride():
                place.copy_(gradient)
        graphed.backward(run.given)

        found: list[Tensor | None] = [None]
        wanted = [
            gradient
            for leaf, gradient in zip(section.leaves, graphed.leaf_gradients, strict=True)
            if leaf.requires_grad
        ]
        for gradient, source in zip(wanted, run.internal, strict=True):
            kept = gradient is not None and (source is None or source() is not None)
            found.append(gradient.clone() if kept and gradient is not None else gradient)
        of_parameters: list[Tensor | None] = [None] * len(section.parameters)
        for flat in graphed.parameter_gradients:
            like = [section.parameters[index] for index in flat.parameters]
            for index, part in zip(
                flat.parameters, _unflatten_dense_tensors(flat.tensor.clone(), like), strict=True
            ):
                of_parameters[index] = part
        return (*found, *of_parameters)
