"""Around a library's product in fp8: what is made for it, and what its operands hold besides.

Under the interpreter, on the device with -m gpu.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from prodial_kernels.kernels.choices.tile_sizes import DeviceLimits
from prodial_kernels.kernels.fp8 import passes
from prodial_kernels.kernels.fp8.library import takes_library, takes_pipelined
from prodial_kernels.kernels.fp8.rounding_side import RoundingSideConfig, launch_rounding_side
from prodial_kernels.kernels.projector.operands import Operands, ProjectionOptions
from prodial_kernels.ops.fp8.rounding import round_to_fp8
from prodial_kernels.testing import LinearCase, assert_case_accurate
from support.fp8.layers import PARTS, fp8_case, stored
from support.quantized_layers import runner


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS's product everywhere: its operands as it is given them, in plain PyTorch."""

    def product(x: Any, codes: Any, scale_inv: Any, dtype: torch.dtype) -> torch.Tensor:
        (m, k), n = x.codes.shape, len(codes)
        left = x.codes.float() * x.scales[:, :m].T.repeat_interleave(128, 1)[:, :k]
        scales = scale_inv.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
        return (left @ (codes.float() * scales).T).to(dtype)

    monkeypatch.setattr(passes, "takes_library", lambda *_, **__: True)
    monkeypatch.setattr(passes, "library_product", product)


def check(case: LinearCase, layer: Any) -> None:
    assert_case_accurate(case, runner(layer, impl="triton"), compute=torch.float16)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("block_size", "r"), [(1, 4), (8, 20)])
def test_around_a_librarys_product(kernel_device: str, block_size: int, r: int) -> None:
    layer = stored(256, 256, device=kernel_device)
    check(replace(fp8_case(layer, 36, block_size=block_size, r=r), bias=None), layer)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_any_part_may_be_missing_around_it(kernel_device: str, parts: dict[str, None]) -> None:
    layer = stored(128, 128, device=kernel_device)
    check(replace(fp8_case(layer, 20), **{"bias": None, **parts}), layer)


CONFIGS = [RoundingSideConfig(), RoundingSideConfig(64, 128, tma=True, items=6, programs=4)]
CONFIGS += [RoundingSideConfig(32, 256, tma=True)]


@pytest.mark.parametrize("config", CONFIGS)
def test_one_read_rounds_and_sums(kernel_device: str, config: RoundingSideConfig) -> None:
    m, n, r = 73, 384, 5
    generator = torch.Generator().manual_seed(6)
    dy, y = (torch.randn(m, n, generator=generator).half().to(kernel_device) for _ in range(2))
    low = torch.randn(m, 16, generator=generator).half().to(kernel_device)
    b = torch.randn(n, r, generator=generator).to(kernel_device) * 0.1
    deviation = torch.randn(n, generator=generator).to(kernel_device) * 0.1
    operands = Operands(y, scale_deviation=deviation, lora_b=b)
    made = launch_rounding_side(
        dy, y, low, operands, ProjectionOptions("triton", 0.5), config=config
    )
    codes, scale = round_to_fp8(dy.float() * (1 + deviation))
    assert torch.equal(made.rounded.codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(made.rounded.scales[:, :m].T, scale)
    assert made.t_parts is not None
    assert made.b is not None
    assert made.scale is not None
    near = {"rtol": 2e-3, "atol": 2e-3}
    factor = (0.5 * b).half().double()
    torch.testing.assert_close(made.t_parts.sum(0)[:, :r].double(), dy.double() @ factor, **near)
    torch.testing.assert_close(made.b.sum(0).double(), dy.double().T @ low.double(), **near)
    z = y.double() - low.double()[:, :r] @ factor.T
    ds = (dy.double() * z).sum(0) / (1 + deviation.double())
    torch.testing.assert_close(made.scale.sum(0).double(), ds, **near)


def test_which_product_is_taken() -> None:
    """Of few columns along K the pass over Y costs more than cuBLAS's product saves."""
    hopper, ada = DeviceLimits((9, 0), 132), DeviceLimits((8, 9), 128)
    with mock.patch.object(torch.version, "cuda", "13.0"):
        assert takes_library(8192, 8192, 2048, hopper, finish=True)
        assert not takes_library(16384, 3072, 768, hopper, finish=True)
        assert takes_library(16384, 3072, 768, hopper, finish=False)
        assert not takes_library(8192, 8192, 2048, ada, finish=True)
        for m, n, k in ((8190, 8192, 2048), (8192, 8200, 2048), (8192, 8192, 2056), (0, 128, 128)):
            assert not takes_library(m, n, k, hopper, finish=False)
        # With the pass over Y; without it cuBLAS's is faster, and of many columns along K anyway.
        assert takes_pipelined(8192, 8192, 2048, hopper, finish=True)
        assert takes_pipelined(16384, 3072, 768, hopper, finish=True, r_pad=32)
        assert not takes_pipelined(8192, 8192, 2048, hopper, finish=False)
        assert not takes_pipelined(8192, 2048, 4096, hopper, finish=True)
        # Of whole tiles and groups, enough of them; on Hopper.
        for m, n, k, r_pad in (
            (8192, 8200, 2048, 16), (8192, 8192, 640, 16), (8192, 8192, 2048, 64),
            (64, 2048, 2048, 16), (0, 2048, 2048, 16),
        ):  # fmt: skip
            assert not takes_pipelined(m, n, k, hopper, finish=True, r_pad=r_pad)
        assert not takes_pipelined(8192, 8192, 2048, ada, finish=True)
    with mock.patch.object(torch.version, "cuda", "12.8"):
        assert not takes_library(8192, 8192, 2048, hopper, finish=False)
        assert takes_pipelined(8192, 8192, 2048, hopper, finish=False)
