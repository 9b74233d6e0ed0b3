"""The report's numbers are those of the model, and its table lines up."""

from __future__ import annotations

import re

import pytest

from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.models.adapt.report import AdapterReport, adapter_report
from support.mixers.toy import Toy

CONFIG = ProdialConfig(r=2, n_blocks=3, modules_to_save=("conv1d", "norm"))
IN_PROJ = 6 * 6 // 3 + 12 + 2 * (6 + 12)
OUT_PROJ = 12 * 12 // 3 + 6 + 2 * (12 + 6)
BIASES = 12 + 6


@pytest.fixture
def model() -> Toy:
    return Toy(width=6, depth=3, vocabulary=11)


@pytest.fixture
def report(model: Toy) -> AdapterReport:
    return apply_prodial(model, CONFIG)


def test_equal_layers_are_one_row(report: AdapterReport) -> None:
    rows = {row.module: row for row in report.rows}
    assert sorted(rows) == ["blocks.*.in_proj", "blocks.*.norm", "blocks.*.out_proj", "conv1d"]
    row = rows["blocks.*.in_proj"]
    assert (row.count, row.shape, row.n_blocks, row.block_size, row.r) == (3, (6, 12), 3, 2, 2)
    assert row.trainable == 3 * IN_PROJ
    assert row.total == 3 * (IN_PROJ + 72) + 12
    assert row.percent == pytest.approx(100 * row.trainable / row.total)
    row = rows["blocks.*.norm"]
    assert (row.count, row.shape, row.n_blocks, row.r) == (3, None, None, None)
    assert (row.trainable, row.percent) == (3 * 12, 100.0)


def test_totals(model: Toy, report: AdapterReport) -> None:
    assert report.trainable == 3 * (IN_PROJ + OUT_PROJ) + 3 * 12 + 42
    assert report.trainable == sum(row.trainable for row in report.rows)
    # The embedding and the head are one tensor, the shared layer is one layer.
    base = 66 + 42 + 3 * (12 + 72 + 72) + BIASES + 42 + 42
    assert report.total == base + 3 * (IN_PROJ + OUT_PROJ)
    assert report.percent == pytest.approx(100 * report.trainable / report.total)
    assert adapter_report(model) == report


def test_table(report: AdapterReport) -> None:
    *lines, covered = str(report).splitlines()
    assert covered == "adapters on 6 of 9 linear layers, which hold 63.7% of the weights"
    assert report.adapted == (6, 9)
    base = 66 + 42 + 3 * (12 + 72 + 72) + BIASES + 42 + 42
    assert report.covered == pytest.approx(6 * 72 / base)
    assert re.match(r"module +in -> out +blocks +r +trainable +total +percent$", lines[0])
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 4 + len(report.rows)
    (in_proj,) = [line for line in lines if "in_proj" in line]
    assert re.match(r"blocks\.\*\.in_proj ×3 +6 -> 12 +3 of 2×2 +2 +180 +408 +44\.118%$", in_proj)
    assert lines[-1].split() == [
        "model", f"{report.trainable:,}", f"{report.total:,}", f"{report.percent:.3f}%"
    ]  # fmt: skip


def test_different_layers_are_different_rows() -> None:
    model = Toy()
    blocks = r"blocks\.[01]\.in_proj|stem|shared"
    rows = apply_prodial(model, ProdialConfig(target_modules=blocks, allow_partial=True)).rows
    assert [(row.module, row.count) for row in rows] == [
        ("stem", 1), ("blocks.*.in_proj", 2), ("blocks.1.twin", 1)
    ]  # fmt: skip


def test_a_bias_trained_beside_the_adapter_is_counted_once(model: Toy) -> None:
    apply_prodial(model, CONFIG)
    model.blocks[0].in_proj.base_layer.bias.requires_grad_()
    report = adapter_report(model)
    assert report.trainable == sum(row.trainable for row in report.rows)
    assert not any("base_layer" in row.module for row in report.rows)


def test_without_an_adapter() -> None:
    report = adapter_report(Toy().requires_grad_(False))
    assert (report.rows, report.trainable, report.percent) == ((), 0, 0.0)
