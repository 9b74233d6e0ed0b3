"""What measures the costs that plans are compared by."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.projector import fit_costs
from prodial_kernels.kernels.choices.costs import Costs
from prodial_kernels.kernels.projector import gemm, input_side, output_side, prepare, reduce


def test_every_cost_is_measured_and_printed_beside_its_value(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, where the steps are what they are on a device, and nothing is computed."""
    launched: set[str] = set()
    times = iter(range(1, 1000))

    def launch(kernel: Any, grid: tuple[int, ...], **given: Any) -> None:
        assert set(kernel.arg_names) <= set(given), kernel.__name__
        launched.add(kernel.__name__)

    def alone(self: fit_costs.Bench, *steps: fit_costs.Step) -> float:
        for step in steps:
            step()
        return float(next(times) ** 2)

    for module in (gemm, input_side, output_side, prepare, reduce):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(fit_costs.Bench, "alone", alone)
    assert fit_costs.main(["--device", "cpu"]) == 0
    assert len(launched) == 5
    printed = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in printed] == list(Costs._fields)


def test_without_a_hopper_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_costs.torch.cuda, "is_available", lambda: False)
    assert fit_costs.main([]) == 2
    assert "needs a Hopper GPU" in capsys.readouterr().err
