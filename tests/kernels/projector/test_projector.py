"""The Triton kernels against fp64: under the interpreter on a CPU, on the device with ``-m gpu``.

The interpreter computes bf16 wrongly (triton-lang/triton#11584), so it sees fp16.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prodial_kernels import prodial_linear
from prodial_kernels.testing import LinearCase, assert_case_accurate, make_case
from support.kernels.kernel_cases import triton_linear

SHAPES = [
    pytest.param((37,), 48, 40, 1, 4, id="M37-K48-N40-P1-r4"),
    pytest.param((1,), 48, 40, 6, 5, id="M1-K48-N40-P6-r5"),
    pytest.param((63,), 36, 35, 12, 3, id="M63-K36-N35-P12-r3"),
    pytest.param((3, 5), 96, 33, 48, 1, id="M3x5-K96-N33-P48-r1"),
    pytest.param((0,), 24, 40, 12, 4, id="M0-K24-N40-P12-r4"),
    pytest.param((70,), 24, 67, 24, 17, id="M70-K24-N67-P24-r17"),
    pytest.param((20,), 96, 32, 96, 70, id="M20-K96-N32-P96-r70"),
    pytest.param((9,), 14, 13, 2, 2, id="M9-K14-N13-P2-r2"),
    pytest.param((20,), 384, 32, 192, 3, id="M20-K384-N32-P192-r3"),
]


@pytest.mark.parametrize("diagonal", ["relu", "free"])
@pytest.mark.parametrize(("tokens", "k", "n", "block_size", "r"), SHAPES)
def test_output_and_gradients_match_fp64(
    kernel_device: str,
    tokens: tuple[int, ...],
    k: int,
    n: int,
    block_size: int,
    r: int,
    diagonal: str,
) -> None:
    case = make_case(
        tokens, k, n, block_size=block_size, r=r, diagonal=diagonal, device=kernel_device
    )
    assert_case_accurate(case, triton_linear, compute=torch.float16)


PARTS = {
    "no blocks": {"blocks": None},
    "no scale": {"scale": None},
    "no lora": {"lora_a": None, "lora_b": None},
    "no bias": {"bias": None},
    "only lora": {"blocks": None, "scale": None, "bias": None},
    "only blocks": {"scale": None, "lora_a": None, "lora_b": None, "bias": None},
    "only scale": {"blocks": None, "lora_a": None, "lora_b": None, "bias": None},
    "nothing": {"blocks": None, "scale": None, "lora_a": None, "lora_b": None, "bias": None},
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_every_part_is_optional(kernel_device: str, parts: dict[str, None]) -> None:
    case = make_case(21, 24, 40, block_size=6, device=kernel_device)
    assert_case_accurate(replace(case, **parts), triton_linear, compute=torch.float16)


def test_scale_gradient_is_exact_for_every_scale(kernel_device: str) -> None:
    case = make_case(40, 24, 70, block_size=6, device=kernel_device)
    scale = case.scale
    assert scale is not None
    scale[::5], scale[1::5], scale[2::5], scale[3::5] = 0.0, -1.0, 1e-3, -1e-6
    assert_case_accurate(case, triton_linear, compute=torch.float16)


@pytest.mark.parametrize("part", ["lora_b", "bias"])
@pytest.mark.parametrize("factor", [0.5, 2.0, 5.0, 30.0])
def test_scale_gradient_where_other_terms_outgrow_it(
    kernel_device: str, factor: float, part: str
) -> None:
    # Y is kept rounded, so whatever it holds beside s ⊙ (U Wᵀ) costs precision.
    case = make_case(72, 96, 64, block_size=1, device=kernel_device)
    grown = getattr(case, part)
    term = case.lora_scaling * case.x @ case.lora_a.T @ grown.T if part == "lora_b" else grown[None]
    own = case.scale * (case.x @ case.weight.T)
    times = factor * own.norm(dim=0) / term.expand_as(own).norm(dim=0)
    grown *= times if part == "bias" else times[:, None]
    assert_case_accurate(case, triton_linear, compute=torch.float16)
    grown[::2] *= 0.01
    assert_case_accurate(case, triton_linear, compute=torch.float16)


def test_rows_with_a_stride_and_an_expanded_gradient(kernel_device: str) -> None:
    case = make_case(20, 48, 40, block_size=6, device=kernel_device)
    case = case.cast(torch.float16, torch.float32)
    wide = torch.randn(20, 96, device=kernel_device)
    strided = replace(case, x=wide[:, 24:72], grad_output=case.grad_output[:1].expand(20, 40))
    assert_case_accurate(strided, triton_linear, compute=torch.float16)


def test_weight_and_bias_in_any_layout(kernel_device: str) -> None:
    case = make_case(20, 24, 40, block_size=6, device=kernel_device)
    case = case.cast(torch.float16, torch.float32)
    assert case.bias is not None
    twice = torch.stack([case.bias, torch.zeros_like(case.bias)], 1).reshape(-1)
    transposed = replace(case, weight=case.weight.T.contiguous().T, bias=twice[::2])
    assert transposed.weight.stride() == (1, 40)
    assert transposed.bias is not None
    assert transposed.bias.stride() == (2,)
    assert_case_accurate(transposed, triton_linear, compute=torch.float16)


def test_two_runs_are_bit_equal(kernel_device: str) -> None:
    case = make_case(70, 48, 40, block_size=6, device=kernel_device)
    case = case.cast(torch.float16, torch.float32)
    first, second = case.run(triton_linear), case.run(triton_linear)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_dropout_is_the_same_in_forward_and_backward(kernel_device: str) -> None:
    case = make_case(64, 48, 40, block_size=6, device=kernel_device)
    case = case.cast(torch.float16, torch.float32)
    assert case.lora_a is not None
    assert case.lora_b is not None
    eye = torch.eye(48, device=kernel_device)

    def run(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        torch.manual_seed(3)
        return prodial_linear(
            x, torch.zeros_like(case.weight), blocks=None, scale=None, lora_a=lora_a,
            lora_b=lora_b, lora_dropout=0.25, training=True, impl="triton",
        )  # fmt: skip

    # With W = 0, A = I and B = I (padded) the output is dropout(x) itself.
    ratio = run(case.x, eye, torch.eye(40, 48, device=kernel_device)) / case.x[:, :40]
    kept = ratio != 0
    assert 0.65 < kept.float().mean() < 0.85
    torch.testing.assert_close(
        ratio[kept], torch.full_like(ratio[kept], 1 / 0.75), rtol=2e-3, atol=0
    )

    full = torch.zeros(64, 48, dtype=torch.bool, device=kernel_device)
    for start in (0, 8):
        selector = torch.zeros(40, 48, device=kernel_device)
        selector[:, start : start + 40] = torch.eye(40, device=kernel_device)
        part = run(case.x, eye, selector) / case.x[:, start : start + 40]
        full[:, start : start + 40] = part != 0
    masked = replace(
        case, blocks=None, scale=None, bias=None, dropout_mask=full, lora_dropout=0.25,
        lora_scaling=1.0,
    )  # fmt: skip

    def run_dropped(c: LinearCase) -> Tensor:
        torch.manual_seed(3)
        return prodial_linear(
            c.x, c.weight, blocks=None, scale=None, lora_a=c.lora_a, lora_b=c.lora_b,
            lora_dropout=0.25, training=True, impl="triton",
        )  # fmt: skip

    assert_case_accurate(masked, run_dropped, compute=torch.float16)


def test_nan_reaches_the_output(kernel_device: str) -> None:
    case = make_case(5, 24, 40, block_size=6, device=kernel_device).cast(
        torch.float16, torch.float32
    )
    assert case.blocks is not None
    case.blocks[1, 2, 2] = float("nan")
    assert triton_linear(case).isnan().all()
