"""The command that measures host time, tried out on a CPU."""

from __future__ import annotations

import pytest

from benchmarks import host_time


def test_the_command_prints_a_row_for_each_layer(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--impl", "torch", "--calls", "3", "--profile"]
    assert host_time.main(options) == 0
    printed = capsys.readouterr().out
    for layer in ("frozen nn.Linear", "prodial_linear", "ProdialLinear"):
        (row,) = (line for line in printed.splitlines() if f" {layer} " in line)
        forward, backward, both = map(float, row.split()[-3:])
        assert 0 < forward < both
        assert 0 < backward < both
    assert "tottime" in printed
