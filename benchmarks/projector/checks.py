"""No figure for a rival that computes something else: the check made before anything is timed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.rows import Refusal
from benchmarks.projector.cases import Case, draw
from benchmarks.projector.rivals import Rival
from benchmarks.projector.rivals.layer import Step
from benchmarks.projector.rivals.methods import METHODS
from prodial_kernels.testing import LinearCase

# A rival may round in other places than the formula does, so more than the package's own tests
# allow; leaving out a part of the adapter is an error of several percent.
FACTOR, BAND = 4.0, 4.0


@dataclass(frozen=True)
class Errors:
    """‖result − fp64‖ / ‖fp64‖: of the output, and the largest among the gradients.

    ``unrounded``: the output's beside the method that the rival's own approximates, if any.
    """

    output: float
    gradient: float
    worst: str
    unrounded: float | None = None


@dataclass
class CorrectnessCheck:
    """Compares rivals with fp64 on one case.

    The fp64 results are computed once for rivals of one method that follow each other; those of
    one method at a time are kept, as they are the largest tensors of a case.

    Args:
        case: The case; its operands are drawn with a seed that no timing uses.
        device: Where to draw and run.
    """

    case: Case
    device: str
    _known: tuple[str, Mapping[str, Tensor], Mapping[str, float]] | None = None

    def __post_init__(self) -> None:
        self.operands: LinearCase = draw(self.case, self.device, seed=1_000_003)

    def errors_of(self, rival: Rival) -> Errors:
        """Run the rival on the case and compare its output and every gradient with fp64.

        Raises:
            Refusal: An error of more than :data:`FACTOR` times that of the plain formula in the
                same dtype, plus :data:`BAND` roundings; a wrong shape; a NaN; a gradient missing.
        """
        exact, eager_errors = self._exact(rival.method)
        results = Step.on(self.operands, rival.prepare).results()
        if results.keys() != exact.keys():
            raise Refusal(f"returns {', '.join(results)}; expected {', '.join(exact)}")
        band = BAND * torch.finfo(self.case.torch_dtype).eps / 2
        errors = {}
        for name, result in results.items():
            if result.shape != exact[name].shape:
                raise Refusal(
                    f"{name}: shape {list(result.shape)}, expected {list(exact[name].shape)}"
                )
            errors[name] = relative_error(result, exact[name])
            allowed = FACTOR * eager_errors[name] + band
            # "not <=" rather than ">": a NaN must be refused.
            if not errors[name] <= allowed:
                raise Refusal(f"{name}: relative error {errors[name]:.1e}, allowed {allowed:.1e}")
        output = errors.pop("output")
        worst = max(errors, key=errors.__getitem__)
        unrounded = None
        if rival.approximates:
            exact, _ = self._exact(rival.approximates)
            unrounded = relative_error(results["output"], exact["output"])
        return Errors(output, errors[worst], worst, unrounded)

    def _exact(self, method: str) -> tuple[Mapping[str, Tensor], Mapping[str, float]]:
        if self._known is None or self._known[0] != method:
            self._known = None
            wide = self.operands.cast(torch.float64, torch.float64)
            exact = Step.on(wide, METHODS[method]).results()
            eager = Step.on(self.operands, METHODS[method]).results()
            errors = {name: relative_error(eager[name], exact[name]) for name in exact}
            self._known = (method, exact, errors)
        return self._known[1:]


def relative_error(result: Tensor, exact: Tensor) -> float:
    """‖result − exact‖ / ‖exact‖ in fp64."""
    scale = float(torch.linalg.vector_norm(exact))
    error = float(torch.linalg.vector_norm(result.double() - exact))
    if scale == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / scale
