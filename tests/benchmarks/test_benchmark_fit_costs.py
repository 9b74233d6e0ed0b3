"""What measures the costs that plans are compared by."""

from __future__ import annotations

import pytest

from benchmarks.projector import fit_costs
from prodial_kernels.kernels.choices.costs import Costs


def test_every_cost_is_measured_and_printed_beside_its_value(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, where nothing is timed: the steps themselves are those of other tests."""
    times = iter(range(1, 1000))

    def alone(self: fit_costs.Bench, *steps: fit_costs.Step) -> float:
        return float(next(times) ** 2)

    monkeypatch.setattr(fit_costs.Bench, "alone", alone)
    assert fit_costs.main(["--device", "cpu"]) == 0
    printed = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in printed] == list(Costs._fields)


def test_without_a_hopper_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_costs.torch.cuda, "is_available", lambda: False)
    assert fit_costs.main([]) == 2
    assert "needs a Hopper GPU" in capsys.readouterr().err
