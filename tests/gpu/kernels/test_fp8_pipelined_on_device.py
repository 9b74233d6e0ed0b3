"""The pipelined product in fp8 on a Hopper; test_fp8_in_one_read_on_device has projections."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prodial_kernels.kernels.fp8.pipelined import PipelinedConfig, launch_pipelined_product
from prodial_kernels.kernels.fp8.quantize import Rounded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="written for Hopper's products (sm_90)",
    ),
]


def product(m: int, n: int, k: int, r: int, dtype: torch.dtype, **sizes: int) -> tuple[Any, Any]:
    """(the kernel's Y, that in fp64) for random operands; r = 0 for the plain product."""
    generator = torch.Generator("cuda").manual_seed(m + n + k)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    x, v = (draw(*shape).to(torch.float8_e4m3fn) for shape in ((m, k), (n, k)))
    # Scales of tokens of every size: a wrong one is seen.
    x_scale = torch.exp2(draw(k // 128, -(-m // 4) * 4).mul(3).round())
    v_scale = draw(n // 128, k // 128).abs() + 0.1
    deviation, low, b = draw(n) * 0.5, draw(m, 32 if r > 16 else 16).to(dtype), draw(n, max(r, 1))
    low[:, r:] = 0
    y = torch.full((m, n), float("nan"), dtype=dtype, device="cuda")
    added: dict[str, Any] = {}
    if r:
        added = {"scale_deviation": deviation, "low": low, "outer": b, "alpha": 0.5}
    config = PipelinedConfig(sizes.pop("unroll", 4), 132)._replace(**sizes)
    launch_pipelined_product(Rounded(x, x_scale), v, v_scale, y, config=config, **added)
    left = x.double() * x_scale[:, :m].T.double().repeat_interleave(128, 1)
    right = v.double() * v_scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    exact = left @ right.T
    if r:
        exact = exact * (1 + deviation.double()) + low[:, :r].double() @ (
            (0.5 * b).to(dtype).double().T
        )
    return y, exact


@pytest.mark.parametrize(
    ("m", "n", "k", "r", "unroll", "dtype"),
    [
        (300, 256, 512, 0, 4, torch.bfloat16), (1000, 384, 2048, 16, 8, torch.bfloat16),
        (77, 128, 768, 20, 6, torch.bfloat16), (4096, 2048, 2048, 16, 8, torch.float16),
    ],
)  # fmt: skip
def test_it_is_the_product(m: int, n: int, k: int, r: int, unroll: int, dtype: torch.dtype) -> None:
    found, exact = product(m, n, k, r, dtype, unroll=unroll)
    if dtype == torch.float16:
        # Scales of every size leave its range.
        found, exact = (part.double().clamp(-6e4, 6e4) for part in (found, exact))
    row = exact.norm(dim=1, keepdim=True)
    assert ((found.double() - exact).norm(dim=1, keepdim=True) / row).max() < 4e-3


def test_two_runs_are_bit_equal() -> None:
    runs = [product(8192, 2048, 2048, 16, torch.bfloat16, unroll=8)[0] for _ in range(3)]
    assert all(torch.equal(runs[0], run) for run in runs)
