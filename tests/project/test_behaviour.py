"""The page on what other libraries do otherwise names tests that exist, for every row."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "prodial_kernels" / "models" / "BEHAVIOUR.md"
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows() -> list[list[str]]:
    """The cells of every row, without headings and rules."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[-1] != "tests"]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:50])
def test_every_row_names_tests_that_exist(row: list[str]) -> None:
    assert len(row) == 4, "what happens, seen with, what we do, tests"
    named = _TEST.findall(row[3])
    assert named, "no test"
    assert re.sub(_TEST, "", row[3]).strip(" ,") == ""
    for file, name in named:
        functions = {
            node.name
            for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef)
        }
        assert name in functions, f"{file} has no {name}"


def test_every_row_of_the_page_is_read() -> None:
    text = PAGE.read_text()
    assert len(rows()) == sum(
        line.startswith("|") and not line.startswith(("|--", "| what happens"))
        for line in text.splitlines()
    )
    assert len(rows()) > 5
