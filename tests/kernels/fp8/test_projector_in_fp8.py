"""The kernels of ``compute="fp8"`` against fp64: under the interpreter, on the device with -m gpu.

fp64 computes with the same rounded operands, which the kernels make bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prodial_kernels.kernels.fp8.product import ProductConfig, launch_product
from prodial_kernels.kernels.fp8.quantize import launch_quantize
from prodial_kernels.kernels.fp8.transpose import launch_transpose
from prodial_kernels.ops.fp8.rounding import round_to_fp8, rounded
from prodial_kernels.testing import LinearCase, assert_case_accurate
from support.fp8.layers import PARTS, fp8_case, stored
from support.kernels.uninterpreted import run_uninterpreted
from support.quantized_layers import runner


def check(case: LinearCase, layer: Any, impl: Any = "triton", **changes: Any) -> None:
    dtype = torch.float16
    assert_case_accurate(case, runner(layer, impl=impl, **changes), compute=dtype)


SHAPES = [
    pytest.param((3, 5), 256, 144, 1, 4, id="M3x5-K256-N144-P1-r4"),
    pytest.param((37,), 200, 75, 1, 17, id="M37-K200-N75-P1-r17"),
    pytest.param((1,), 128, 128, 1, 4, id="M1-K128-N128-P1-r4"),
    pytest.param((0,), 24, 40, 12, 4, id="M0-K24-N40-P12-r4"),
    pytest.param((20,), 96, 67, 24, 4, id="M20-K96-N67-P24-r4"),
    pytest.param((9,), 14, 13, 2, 2, id="M9-K14-N13-P2-r2"),
    pytest.param((20,), 256, 130, 128, 70, id="M20-K256-N130-P128-r70"),
]


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(("tokens", "k", "n", "block_size", "r"), SHAPES)
def test_output_and_gradients_match_fp64(
    kernel_device: str,
    tokens: tuple[int, ...],
    k: int,
    n: int,
    block_size: int,
    r: int,
    impl: str,
) -> None:
    layer = stored(n, k, device=kernel_device)
    check(fp8_case(layer, tokens, block_size=block_size, r=r), layer, impl)


@pytest.mark.parametrize("diagonal", ["relu", "free"])
def test_both_kinds_of_diagonal(kernel_device: str, diagonal: str) -> None:
    layer = stored(80, 160, device=kernel_device)
    check(fp8_case(layer, 19, diagonal=diagonal), layer)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_any_part_may_be_missing(kernel_device: str, parts: dict[str, None], impl: str) -> None:
    layer = stored(72, 136, device=kernel_device)
    check(replace(fp8_case(layer, 21), **parts), layer, impl)


@pytest.mark.parametrize("block_size", [1, 8])
def test_the_scales_gradient_where_division_is_not_sound(
    kernel_device: str, block_size: int
) -> None:
    """The LoRA term outgrows W x in some columns, and s is 0 in one."""
    layer = stored(72, 136, device=kernel_device)
    case = fp8_case(layer, 33, block_size=block_size)
    assert case.scale is not None
    assert case.lora_b is not None
    case.scale[5] = 0
    case.lora_b[40:44] *= 100
    check(case, layer)


def test_what_is_computed_differs_from_16_bits_by_the_rounding(kernel_device: str) -> None:
    """3 to 4% an element of the product, and no bias: a test of the definition itself."""
    layer = stored(256, 512, device=kernel_device)
    case = fp8_case(layer, 256)
    here = case.run(LinearCase.reference)
    exact = replace(case, compute="same").run(LinearCase.reference)
    difference = here["output"] - exact["output"]
    error = difference.norm() / exact["output"].norm()
    assert 0.005 < error < 0.04
    assert difference.mean().abs() < 4 * difference.std() / difference.numel() ** 0.5


def inputs(m: int, k: int, device: str) -> torch.Tensor:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).half()
    x[1] *= 1e-6
    x[2] = 0
    x[3, 5] = 1e4
    x[4, 7], x[5, 9] = float("inf"), float("nan")
    return x.to(device)


@pytest.mark.parametrize(("m", "k"), [(40, 256), (19, 200)])
def test_the_codes_are_those_of_the_definition_bit_for_bit(
    kernel_device: str, m: int, k: int
) -> None:
    x = inputs(m, k, kernel_device)
    factor = torch.randn(k, generator=torch.Generator().manual_seed(2)).to(kernel_device) * 0.1
    found, _ = launch_quantize(x, factor=factor)
    codes, scale = round_to_fp8(x.float() * (1 + factor))
    assert torch.equal(found.scales[:, :m].T.nan_to_num(), scale.nan_to_num())
    assert scale.isnan().sum() == 2
    finite = scale.repeat_interleave(128, 1)[:, :k].isfinite()
    assert torch.equal(found.codes.view(torch.uint8)[finite], codes.view(torch.uint8)[finite])


@pytest.mark.parametrize("tile", [None, (16, 4, 3, 1), (64, 8, 3, 2)])
def test_the_low_rank_product_of_the_same_pass(kernel_device: str, tile: Any) -> None:
    x = inputs(35, 200, kernel_device).nan_to_num(0, 0, 0)
    a = torch.randn(5, 200, generator=torch.Generator().manual_seed(3)).to(kernel_device)
    _, low = launch_quantize(x, inner=a, tile=tile)
    assert low is not None
    exact = x.double() @ a.half().double().T
    torch.testing.assert_close(low[:, :5].double(), exact, rtol=2**-10, atol=1e-3)
    assert not low[:, 5:].any()


@pytest.mark.parametrize("config", [ProductConfig(), ProductConfig(64, 64, tma=False, programs=2)])
@pytest.mark.parametrize(("m", "n", "k"), [(130, 192, 256), (5, 33, 130)])
def test_the_product_of_rounded_operands(
    kernel_device: str, config: ProductConfig, m: int, n: int, k: int
) -> None:
    layer = stored(n, k, device=kernel_device)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).half().to(kernel_device)
    operand, _ = launch_quantize(x)
    y = torch.empty(m, n, dtype=torch.float16, device=kernel_device)
    launch_product(operand, layer.codes, layer.weight_scale_inv, y, config=config)
    exact = rounded(x).double() @ layer.dequantize().double().T
    torch.testing.assert_close(y.double(), exact, rtol=2**-10, atol=2**-10)


def test_a_stored_weight_is_transposed_exactly(kernel_device: str) -> None:
    layer = stored(150, 133, device=kernel_device)
    codes, scales = launch_transpose(layer.codes, layer.weight_scale_inv)
    assert torch.equal(codes.view(torch.uint8), layer.codes.view(torch.uint8).T)
    assert torch.equal(scales[:, :2], layer.weight_scale_inv.T)
    assert not scales[:, 2:].any()


def test_two_runs_are_bit_equal(kernel_device: str) -> None:
    layer = stored(144, 256, device=kernel_device)
    case = fp8_case(layer, 70).cast(torch.float16, torch.float32)
    first, second = (case.run(runner(layer, impl="triton")) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dropout_leaves_the_product_alone(kernel_device: str) -> None:
    """At p = 0.5 and with B = 0 the output is that without dropout; T A is masked as H was."""
    layer = stored(72, 136, device=kernel_device)
    case = fp8_case(layer, 33, r=20).cast(torch.float16, torch.float32)
    assert case.lora_b is not None
    quiet = replace(case, lora_b=torch.zeros_like(case.lora_b))
    dropped = quiet.run(runner(layer, impl="triton", lora_dropout=0.5))
    plain = quiet.run(runner(layer, impl="triton"))
    assert torch.equal(dropped["output"], plain["output"])
    ratio = dropped["d_lora_b"].norm() / plain["d_lora_b"].norm()
    assert 1 < ratio < 2


def test_channel_first_output_and_strided_input(kernel_device: str) -> None:
    from prodial_kernels.functional import checked_linear

    layer = stored(72, 136, device=kernel_device)
    case = fp8_case(layer, (2, 16)).cast(torch.float16, torch.float32)
    options = case.options("triton")._replace(packed=layer.packed_weight())
    operands = case.operands._replace(weight=layer.stand_in())
    plain = checked_linear(case.x, operands, options)
    strided = case.x.mT.contiguous().mT
    assert torch.equal(checked_linear(strided, operands, options), plain)
    turned = checked_linear(case.x, operands, options, channel_first=True)
    assert turned.is_contiguous()
    assert torch.equal(turned.mT, plain)


def test_what_they_compile_to(tmp_path: Path) -> None:
    """For every kind of GPU with fp8, aligned and not; the script names what breaks a rule."""
    run_uninterpreted(tmp_path, "../fp8/compile_kernels.py")
