"""Every launch that ``test_compile_only.py`` compiles, run on a GPU and compared with fp64.

Not only the winners of a tuning run: a compiler can get one configuration wrong and the next right.
``PRODIAL_LAUNCHES=all`` runs every projector of the matrix instead of a covering choice.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from kernel_cases import assert_matches_fp64, dropout_mask, triton_linear
from launch_matrix import Projector
from torch import Tensor
from uninterpreted import run_uninterpreted

from prodial_kernels.testing import LinearCase, make_case

PARTS = 28


@pytest.fixture(scope="session")
def projectors(tmp_path_factory: pytest.TempPathFactory) -> list[Projector]:
    """The projectors that cover the launches of this device, found once for all workers."""
    major, minor = torch.cuda.get_device_capability()
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", f"pid{os.getpid()}")
    folder = tmp_path_factory.getbasetemp().parent
    found = folder / f"projectors-{run}.json"
    with FileLock(f"{found}.lock"):
        if not found.exists():
            run_uninterpreted(
                folder, "compile_launches.py", "--arch", str(10 * major + minor),
                "--cover", os.environ.get("PRODIAL_LAUNCHES", "triples"),
                "--projectors", str(found),
            )  # fmt: skip
        return [Projector.from_json(values) for values in json.loads(found.read_text())]


def check(projector: Projector, device: str = "cuda") -> None:
    """Compare output and gradients with fp64, by the accuracy rule."""
    m, k, dtype = projector.m, projector.k, projector.dtype
    sequences = projector.x_channel_first or projector.y_channel_first
    case = make_case(
        (2, m // 2) if sequences else m, k, projector.n,
        block_size=projector.block_size or 1, r=projector.r or 1,
        diagonal="relu" if projector.relu else "free", device=device,
    )  # fmt: skip
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
    trained = [n for n, need in zip(LinearCase.TRAINED, projector.needs, strict=True) if need]

    def run(case: LinearCase) -> Tensor:
        x = case.x.mT.contiguous().mT if projector.x_channel_first else case.x
        y = triton_linear(replace(case, x=x), channel_first=projector.y_channel_first)
        return y.mT if projector.y_channel_first else y

    assert_matches_fp64(replace(case, **changes), compute=dtype, trained=trained, function=run)


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(PARTS))
def test_launches_match_fp64(part: int, projectors: list[Projector]) -> None:
    wrong = []
    for projector in projectors[part::PARTS]:
        try:
            check(projector)
        except (AssertionError, RuntimeError, ValueError) as error:
            wrong.append(f"{projector or 'default'}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)
    assert len(projectors) > PARTS


def test_the_check_itself(tmp_path: Path) -> None:
    """On a CPU: projectors survive their file, and one of each kind is compared."""
    found = tmp_path / "projectors.json"
    run_uninterpreted(
        tmp_path, "compile_launches.py", "--quick", "--cover", "values",
        "--projectors", str(found),
    )  # fmt: skip
    chosen = [Projector.from_json(values) for values in json.loads(found.read_text())]
    assert len(chosen) > 20
    assert any(p.dropout for p in chosen)
    assert any(p.dtype is torch.float16 for p in chosen)
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
