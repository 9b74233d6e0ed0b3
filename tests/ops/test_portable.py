"""``impl="torch"``: accuracy against fp64, gradcheck, and only the gradients that are asked for."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prodial_kernels.ops.diagonal import block_outer_product, deviation_backward
from prodial_kernels.ops.function import differentiable_projection
from prodial_kernels.ops.reference import effective_weight
from prodial_kernels.testing import LinearCase, assert_case_accurate, make_case

BLOCK_SIZES = (1, 2, 6, 12, 24, 48)
DIAGONALS = ("relu", "free")
PARTS = {
    "blocks": ("blocks",),
    "scale": ("scale",),
    "lora": ("lora_a", "lora_b"),
    "bias": ("bias",),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def hand_written(case: LinearCase) -> Tensor:
    return differentiable_projection(case.x, case.operands, case.options("torch"))


def with_dropout(case: LinearCase, probability: float) -> LinearCase:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(case.x.shape, generator=generator) >= probability
    return replace(case, dropout_mask=mask, lora_dropout=probability)


def width_of(block_size: int) -> int:
    """An in_features that P divides, and that 8 divides only where P forces it."""
    return block_size * {1: 37, 2: 19, 6: 7, 12: 5, 24: 3, 48: 3}[block_size]


def without(case: LinearCase, absent: tuple[str, ...]) -> LinearCase:
    return replace(case, **{name: None for part in absent for name in PARTS[part]})


SUBSETS = [
    absent for count in range(len(PARTS) + 1) for absent in itertools.combinations(PARTS, count)
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_accuracy(block_size: int, diagonal: str, dtype: torch.dtype) -> None:
    for tokens, out_features in ((0, 29), (1, 29), (63, 29), (63, width_of(block_size))):
        case = make_case(
            tokens, width_of(block_size), out_features, block_size=block_size, diagonal=diagonal
        )
        assert_case_accurate(case, hand_written, compute=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 6])
def test_accuracy_with_dropout(block_size: int, dtype: torch.dtype) -> None:
    case = with_dropout(make_case((2, 31), 42, 29, block_size=block_size), 0.3)
    assert_case_accurate(case, hand_written, compute=dtype)


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 0, 3), (2, 3, 4, 1)], ids=str)
def test_accuracy_of_leading_shapes(lead: tuple[int, ...], master: torch.dtype) -> None:
    case = make_case(lead, 42, 29, block_size=6)
    assert case.run(hand_written)["output"].shape == (*lead, 29)
    assert_case_accurate(case, hand_written, compute=torch.bfloat16, master=master)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 6])
@pytest.mark.parametrize("layout", ["row-strided", "transposed", "expanded", "grad-strided"])
def test_accuracy_of_non_contiguous_operands(
    layout: str, block_size: int, dtype: torch.dtype
) -> None:
    case = make_case((5, 13), 42, 29, block_size=block_size).cast(dtype, torch.float32)
    x, grad_output = case.x, case.grad_output
    if layout == "row-strided":
        x = torch.cat([x, x], dim=-1)[..., :42]
    elif layout == "transposed":
        x = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    elif layout == "expanded":
        x = x[:, :1].expand(5, 13, 42)
    else:
        grad_output = grad_output.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    case = replace(case, x=x, grad_output=grad_output)
    assert not (x.is_contiguous() and grad_output.is_contiguous())
    assert_case_accurate(case, hand_written, compute=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("diagonal", DIAGONALS)
def test_accuracy_of_small_zero_and_negative_scales(diagonal: str, dtype: torch.dtype) -> None:
    case = make_case(63, 42, 29, block_size=6, diagonal=diagonal)
    assert case.scale is not None
    case.scale[:7] = torch.tensor([0.0, -0.0, -1.3, 1e-3, -1e-3, 3e-5, 4.0], dtype=torch.float64)
    assert_case_accurate(case, hand_written, compute=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("absent", SUBSETS, ids=str)
def test_accuracy_without_parts(absent: tuple[str, ...], dtype: torch.dtype) -> None:
    case = without(make_case(31, 42, 29, block_size=6), absent)
    assert_case_accurate(case, hand_written, compute=dtype)


def gradcheck(case: LinearCase, *, fast_mode: bool = False) -> None:
    """Compare the analytical with the numerical Jacobian towards every trained operand."""
    names = [name for name in LinearCase.TRAINED if getattr(case, name) is not None]
    leaves = [getattr(case, name).detach().requires_grad_() for name in names]

    def function(*operands: Tensor) -> Tensor:
        return hand_written(replace(case, **dict(zip(names, operands, strict=True))))

    torch.autograd.gradcheck(function, leaves, fast_mode=fast_mode)


@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("absent", [s for s in SUBSETS if "blocks" not in s], ids=str)
def test_gradcheck(absent: tuple[str, ...], block_size: int, diagonal: str) -> None:
    width = block_size * (1 if block_size > 12 else 3)
    case = make_case(3, width, 5, block_size=block_size, r=2, diagonal=diagonal)
    # The whole Jacobian of thousands of entries is slow: there, a random projection of it.
    gradcheck(without(case, absent), fast_mode=block_size > 6)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("absent", [s for s in SUBSETS if "blocks" in s], ids=str)
def test_gradcheck_without_blocks(absent: tuple[str, ...], dropout: float) -> None:
    gradcheck(with_dropout(without(make_case(3, 7, 5, r=2), absent), dropout))


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("block_size", [1, 6])
def test_gradcheck_of_few_tokens_and_dropout(tokens: int, block_size: int) -> None:
    case = make_case(tokens, 12, 5, block_size=block_size, r=2)
    gradcheck(with_dropout(case, 0.4))


def test_only_the_gradients_asked_for_are_computed() -> None:
    whole = with_dropout(make_case((2, 9), 42, 29, block_size=6), 0.3)
    expected = whole.run(hand_written)
    for count in range(1, len(LinearCase.TRAINED) + 1):
        for asked in itertools.combinations(LinearCase.TRAINED, count):
            leaves = {n: getattr(whole, n).detach() for n in LinearCase.TRAINED}
            for name in asked:
                leaves[name].requires_grad_()
            output = hand_written(replace(whole, **leaves))
            # Autograd drops what was not asked for; the node itself must not compute it either.
            gradients = output.grad_fn.apply(whole.grad_output)
            positions = {"x": 0, "blocks": 2, "scale": 3, "lora_a": 4, "lora_b": 5, "bias": 6}
            for name in LinearCase.TRAINED:
                gradient = gradients[positions[name]]
                assert (gradient is not None) == (name in asked), f"{name}, asked for {asked}"
                if gradient is not None:
                    torch.testing.assert_close(gradient, expected[f"d_{name}"])


def test_without_any_gradient_nothing_is_recorded() -> None:
    case = make_case(5, 12, 7)
    assert not hand_written(case).requires_grad
    case.x.requires_grad_()
    with torch.no_grad():
        assert not hand_written(case).requires_grad


@pytest.mark.parametrize("block_size", [1, 6])
@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("absent", SUBSETS, ids=str)
def test_equals_a_linear_layer_with_the_effective_weight(
    absent: tuple[str, ...], diagonal: str, block_size: int
) -> None:
    """W' is an independent route to output and gradients: autograd through F.linear(x, W')."""
    case = without(make_case(17, 12, 9, block_size=block_size, diagonal=diagonal), absent)

    def materialised(case: LinearCase) -> Tensor:
        adapted = effective_weight(
            case.weight, case.blocks, case.scale_deviation, case.lora_a, case.lora_b,
            case.lora_scaling,
            case.diagonal,
        )  # fmt: skip
        return torch.nn.functional.linear(case.x, adapted, case.bias)

    expected = case.run(materialised)
    for name, tensor in case.run(hand_written).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("block_size", [1, 6])
def test_equals_the_derived_formulas(block_size: int, dropout: float) -> None:
    """The equations of ops/README.md, written out with a dense D_b."""
    case = with_dropout(make_case(17, 12, 9, block_size=block_size, diagonal="free"), dropout)
    x, weight, dy, alpha = case.x, case.weight, case.grad_output, case.lora_scaling
    blocks, scale, a, b = case.blocks, case.scale, case.lora_a, case.lora_b
    assert blocks is not None
    assert scale is not None
    assert a is not None
    assert b is not None
    assert case.dropout_mask is not None
    d = torch.eye(12, dtype=torch.float64) + torch.block_diag(*blocks)
    keep = case.dropout_mask.double() / (1 - dropout)

    u = x @ d.T
    h = (x * keep) @ a.T
    g = dy * scale
    du = g @ weight
    dense_dd = du.T @ x
    spans = [slice(i, i + block_size) for i in range(0, 12, block_size)]
    expected = {
        "output": scale * (u @ weight.T) + alpha * h @ b.T + case.bias,
        "d_x": du @ d + keep * (alpha * (dy @ b) @ a),
        "d_blocks": torch.stack([dense_dd[span, span] for span in spans]),
        "d_scale": (dy * (u @ weight.T)).sum(0),
        "d_lora_a": alpha * (dy @ b).T @ (x * keep),
        "d_lora_b": alpha * dy.T @ h,
        "d_bias": dy.sum(0),
    }
    result = case.run(hand_written)
    assert result.keys() == expected.keys()
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("diagonal", DIAGONALS)
def test_nan_in_the_blocks_reaches_the_output(diagonal: str) -> None:
    for block_size in (1, 6):
        case = make_case(3, 12, 5, block_size=block_size, diagonal=diagonal)
        assert case.blocks is not None
        case.blocks[0, 0, 0] = float("nan")
        result = case.run(hand_written)
        assert result["output"].isnan().all(), block_size
        assert result["d_x"].isnan().any(), block_size


@pytest.mark.parametrize("block_size", [1, 6])
def test_sums_over_tokens_that_fp16_cannot_hold(block_size: int) -> None:
    """Each term fits, their sum does not; the masters are fp32."""
    case = make_case(17, 42, 29, block_size=block_size).cast(torch.float16, torch.float32)
    case.x.fill_(200.0)
    case.grad_output.fill_(200.0)
    gradients = case.run(hand_written)
    exact = case.cast(torch.float64, torch.float64).run(hand_written)
    for name in ("d_blocks", "d_scale", "d_lora_a", "d_lora_b"):
        assert exact[name].abs().max() > 65504, name
        error = (gradients[name].double() - exact[name]).norm() / exact[name].norm()
        assert error < 2e-3, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [1, 2, 6])
@pytest.mark.parametrize("tokens", [3, 256])
def test_what_is_summed_over_tokens_is_rounded_to_the_master_alone(
    block_size: int, dtype: torch.dtype, tokens: int
) -> None:
    """From the same 16-bit factors, so that only the sums can err."""
    case = make_case(tokens, 48, 40, block_size=block_size).cast(dtype, torch.float32)
    case = replace(case, scale=None, bias=case.bias.float())
    found = case.run(hand_written)
    dy, x = case.grad_output, case.x
    du = (dy @ case.weight).double()
    exact = {
        "d_bias": dy.double().sum(0),
        "d_lora_b": case.lora_scaling * dy.double().T @ (x @ case.lora_a.T.to(dtype)).double(),
        "d_lora_a": (case.lora_scaling * (dy @ case.lora_b.to(dtype))).double().T @ x.double(),
        "d_blocks": deviation_backward(
            block_outer_product(du, x.double(), block_size), case.blocks.double(), "relu"
        ),
    }
    for name, expected in exact.items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("lead", [(), (3,), (2, 0)], ids=str)
@pytest.mark.parametrize(("in_features", "out_features"), [(0, 5), (6, 0), (0, 0)])
def test_layers_without_features(
    lead: tuple[int, ...], in_features: int, out_features: int
) -> None:
    case = make_case(lead, in_features or 6, out_features or 5, block_size=1)
    case = replace(
        case, x=case.x[..., :in_features], weight=case.weight[:out_features, :in_features],
        blocks=case.blocks[:in_features], scale=case.scale[:out_features],
        lora_a=case.lora_a[:, :in_features], lora_b=case.lora_b[:out_features],
        bias=case.bias[:out_features], grad_output=case.grad_output[..., :out_features],
    )  # fmt: skip
    expected = case.run(LinearCase.reference)
    torch.testing.assert_close(case.run(hand_written), expected)
