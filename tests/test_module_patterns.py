"""Regular expressions of modules: those that end in a moment run, the others are refused."""

from __future__ import annotations

import re
import time

import pytest

from prodial_kernels import ProdialConfig
from prodial_kernels.module_patterns import compile_pattern

PATH = "model.backbone.layers.127.mixer.in_projection_of_the_state_space_model_x"


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(in|out)_proj", r"layers\.\d{1,3}\.mixer\.in_proj", r"(?!.*visual).*proj",
        r".*\.layers\.\d+\..*_proj", r"(?:layers|blocks)\.(\d+)\.(mixer|mamba)\.(in|out)_proj",
        r"(.*\.)?in_proj", r"(?i).*PROJ", r"(ab){3}c", r".*a.*b.*c.*d",
        "|".join(rf"layers\.{i}\.in_proj" for i in range(500)),
    ],
)  # fmt: skip
def test_patterns_that_end(pattern: str) -> None:
    start = time.perf_counter()
    ProdialConfig(target_modules=pattern).target_of(PATH)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+b", r"(.*)*", r"(a|aa)+$", r"([a-z_]+)*\d", r".*.*.*.*.*.*.*.*x",
        "a?" * 60 + "a" * 60, r"(?=(a+)+)b", r"(a{1,100}){1,100}", r"(?P<x>(a*)*)",
        r"(?:x(?:y*)*)?z", r"(.+?)+?!",
    ],
)  # fmt: skip
def test_patterns_that_may_not(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"target_modules=.* may take for ever: .*name the m"):
        ProdialConfig(target_modules=pattern)


@pytest.mark.parametrize("pattern", ["in_(", "(" * 5000 + ")" * 5000, "a{99999999999999}", "[[a]"])
def test_patterns_that_are_none(pattern: str) -> None:
    with pytest.raises(ValueError, match="is not a regular expression: "):
        compile_pattern(pattern, "target_modules")


def test_a_plain_name_is_a_name() -> None:
    config = ProdialConfig(target_modules="in_proj", n_blocks={"in_proj": 4})
    assert config.target_modules == ("in_proj",)
    assert config.target_of("layers.0.mixer.in_proj") == "in_proj"
    assert re.search("in_proj", config.to_json())
