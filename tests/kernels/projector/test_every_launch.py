"""Every launch that ``test_compile_only.py`` compiles, run on a GPU and compared with fp64.

Not only the winners of a tuning run: a compiler can get one configuration wrong and the next right.
``PRODIAL_LAUNCHES=all`` runs every projector of the matrix instead of a covering choice.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prodial_kernels.testing import LinearCase, assert_all_accurate, make_case
from support.distributed.once import once
from support.kernels.kernel_cases import dropout_mask, gradients_of, triton_linear
from support.kernels.launch_matrix import Projector, matrix
from support.kernels.uninterpreted import run_uninterpreted

PARTS = 28
# Workers share the device, so what fp64 computes on the way to a result is kept small, and memory
# that large cases leave in a worker's cache is given back.
ROWS = 2048
MOST_CACHED = 2 * 2**30


@pytest.fixture(scope="session")
def projectors(tmp_path_factory: pytest.TempPathFactory) -> list[Projector]:
    """The projectors that cover the launches of this device, found once for all workers."""
    major, minor = torch.cuda.get_device_capability()

    def find(folder: Path) -> None:
        run_uninterpreted(
            folder, "compile_launches.py", "--arch", str(10 * major + minor),
            "--cover", os.environ.get("PRODIAL_LAUNCHES", "triples"),
            "--projectors", str(folder / "found.json"),
        )  # fmt: skip

    found = once(tmp_path_factory, "projectors", find) / "found.json"
    return [Projector.from_json(values) for values in json.loads(found.read_text())]


def in_fp64(case: LinearCase, trained: Sequence[str]) -> dict[str, Tensor]:
    """The definition in fp64, ``ROWS`` tokens at a time: output, and gradients of ``trained``."""
    per_token = ("x", "grad_output", "dropout_mask")
    flat = {name: getattr(case, name) for name in per_token if getattr(case, name) is not None}
    parts = [
        gradients_of(
            replace(case, **dict(zip(flat, rows, strict=True))).cast(torch.float64, torch.float64),
            LinearCase.reference, trained,
        )
        for rows in zip(*(t.flatten(0, -2).split(ROWS) for t in flat.values()), strict=True)
    ]  # fmt: skip
    return {
        name: torch.cat([part[name] for part in parts]).view(*case.x.shape[:-1], -1)
        if name in ("output", "d_x")
        else torch.stack([part[name] for part in parts]).sum(0)
        for name in parts[0]
    }


def check(projector: Projector, device: str = "cuda") -> None:
    """Compare output and gradients with fp64, by the accuracy rule."""
    m, k, dtype = projector.m, projector.k, projector.dtype
    sequences = projector.x_channel_first or projector.y_channel_first
    case = make_case(
        (2, m // 2) if sequences else m, k, projector.n,
        block_size=projector.block_size or 1, r=projector.r or 1,
        diagonal="relu" if projector.relu else "free", device=device,
    ).cast(dtype, torch.float32)  # fmt: skip
    absent = {
        "blocks": projector.block_size is None, "scale": not projector.scale,
        "lora_a": projector.r is None, "lora_b": projector.r is None, "bias": not projector.bias,
    }  # fmt: skip
    changes: dict[str, Any] = {name: None for name, is_absent in absent.items() if is_absent}
    if projector.dropout:
        mask = dropout_mask(m, k, 0.1, device=device, dtype=dtype)
        changes |= {"lora_dropout": 0.1, "dropout_mask": mask.view(*case.x.shape)}
    if projector.columns_before_x:
        wide = torch.empty(m, k + projector.columns_before_x, device=device, dtype=dtype)
        changes["x"] = wide[:, projector.columns_before_x :].copy_(case.x)
    case = replace(case, **changes)
    trained = [
        name
        for name, need in zip(LinearCase.TRAINED, projector.needs, strict=True)
        if need and getattr(case, name) is not None
    ]

    def run(case: LinearCase) -> Tensor:
        x = case.x.mT.contiguous().mT if projector.x_channel_first else case.x
        y = triton_linear(replace(case, x=x), channel_first=projector.y_channel_first)
        return y.mT if projector.y_channel_first else y

    result = gradients_of(case, run, trained)
    eager = gradients_of(case, LinearCase.reference, trained)
    assert_all_accurate(result, eager, in_fp64(case, trained), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(PARTS))
def test_launches_match_fp64(part: int, projectors: list[Projector]) -> None:
    wrong = []
    for projector in projectors[part::PARTS]:
        try:
            check(projector)
        except (AssertionError, RuntimeError, ValueError) as error:
            wrong.append(f"{projector or 'default'}: {type(error).__name__}: {error}")
        if torch.cuda.memory_reserved() > MOST_CACHED:
            torch.cuda.empty_cache()
    assert not wrong, "\n".join(wrong)
    assert len(projectors) > PARTS


def test_the_check_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: projectors survive their file, and one of each kind is compared."""
    monkeypatch.setattr(sys.modules[__name__], "ROWS", 2)
    all_of_them = list(matrix(quick=True))
    written = json.dumps([projector.as_json() for projector in all_of_them])
    assert [Projector.from_json(values) for values in json.loads(written)] == all_of_them
    assert any(p.dropout for p in all_of_them)
    assert any(p.dtype is torch.float16 for p in all_of_them)
    if not torch.cuda.is_available():
        small = Projector(m=5, k=24, n=20, block_size=6, r=3, dtype=torch.float16)
        for each in (
            small,
            replace(small, dropout=True, bias=False, columns_before_x=3),
            replace(
                small, block_size=None, scale=False, needs=(False, True, True, True, False, True)
            ),
        ):
            check(each, "cpu")
