"""``prodial_linear``: dispatch, dropout, autocast, and the message of every error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from prodial_kernels import prodial_linear, resolve_impl
from prodial_kernels.ops.function import ProdialLinearFunction
from prodial_kernels.testing import LinearCase, assert_all_accurate, make_case

IMPLS = ("reference", "torch")


def options(case: LinearCase, **changes: Any) -> dict[str, Any]:
    return {
        "blocks": case.blocks, "scale": case.scale, "lora_a": case.lora_a, "lora_b": case.lora_b,
        "bias": case.bias, "lora_scaling": case.lora_scaling, "diagonal": case.diagonal, **changes,
    }  # fmt: skip


def apply(case: LinearCase, **changes: Any) -> Tensor:
    return prodial_linear(case.x, case.weight, **options(case, **changes))


@pytest.mark.parametrize(
    ("value", "error"),
    [("1", TypeError), (True, TypeError), (None, TypeError), (float("nan"), ValueError),
     (float("inf"), ValueError), (1e308, ValueError), (10**400, ValueError)],
)  # fmt: skip
def test_alpha_is_a_finite_number(value: Any, error: type[Exception]) -> None:
    for impl in IMPLS:
        with pytest.raises(error, match="lora_scaling must be a"):
            apply(make_case(3, 6, 5), lora_scaling=value, impl=impl)


# --- Choosing the implementation. ---------------------------------------------------------------


def test_auto_is_torch_on_the_cpu() -> None:
    assert resolve_impl("auto") == "torch"
    case = make_case(3, 6, 5)
    case.x.requires_grad_()
    assert type(apply(case).grad_fn).__name__ == "ProdialLinearFunctionBackward"
    assert type(apply(case, impl="torch").grad_fn).__name__ == "ProdialLinearFunctionBackward"


def test_an_explicit_choice_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(3, 6, 5)

    def refuse(*args: object) -> Tensor:
        raise RuntimeError("the torch implementation was called")

    monkeypatch.setattr(ProdialLinearFunction, "apply", refuse)
    torch.testing.assert_close(apply(case, impl="reference"), case.reference())
    for impl in ("torch", "auto"):
        with pytest.raises(RuntimeError, match="torch implementation was called"):
            apply(case, impl=impl)


@pytest.mark.parametrize("call", [lambda: resolve_impl("cuda"),
                                  lambda: apply(make_case(3, 6, 5), impl="cuda")])  # fmt: skip
def test_unknown_impl(call: Any) -> None:
    with pytest.raises(ValueError, match=r"impl must be one of 'auto', .*'torch'.*, got 'cuda'"):
        call()


def test_only_the_reference_trains_the_weight() -> None:
    case = make_case(3, 6, 5)
    case.weight.requires_grad_()
    message = r"weight is frozen .* has requires_grad=True; call weight.requires_grad_\(False\)"
    for impl in ("torch", "auto"):
        with pytest.raises(ValueError, match=message):
            apply(case, impl=impl)
        with torch.no_grad():
            apply(case, impl=impl)
    apply(case, impl="reference").sum().backward()
    assert case.weight.grad is not None
    assert case.weight.grad.count_nonzero() == case.weight.numel()


@pytest.mark.parametrize("impl", IMPLS)
def test_plain_lora_is_pefts_formula(impl: str) -> None:
    case = make_case((2, 9), 12, 5)
    expected = linear(case.x, case.weight, case.bias)
    expected = expected + 0.5 * linear(linear(case.x, case.lora_a), case.lora_b)
    torch.testing.assert_close(apply(case, blocks=None, scale=None, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_part_at_all_is_the_layer_itself(impl: str) -> None:
    case = make_case((2, 9), 12, 5)
    nothing = dict.fromkeys(("blocks", "scale", "lora_a", "lora_b"))
    result = apply(case, **nothing, impl=impl)
    torch.testing.assert_close(result, linear(case.x, case.weight, case.bias))


# --- Errors: the name, what was expected, what came. --------------------------------------------

WRONG_SHAPES: list[tuple[dict[str, tuple[int, ...]], str]] = [
    ({"x": (3, 11)}, r"x must have shape \[\.\.\., in_features\] = \[\.\.\., 12\], got \[3, 11\]"),
    ({"x": ()}, r"x must have shape .* got \[\]"),
    ({"weight": (5, 12, 1)}, r"weight must have shape \[out_features, in_features\], got \[5, 12"),
    ({"weight": (12,)}, r"weight must have shape \[out_features, in_features\], got \[12\]"),
    ({"blocks": (12,)}, r"blocks must have shape \[n_blocks, P, P\] .*12, got \[12\]"),
    ({"blocks": (3, 3, 4)}, r"blocks must have shape .* got \[3, 3, 4\]"),
    ({"blocks": (3, 3, 3)}, r"got \[3, 3, 3\]; P can be one of \[1, 2, 3, 4, 6, 12\]"),
    ({"scale": (12,)}, r"scale must have shape \[out_features\] = \[5\], got \[12\]"),
    ({"scale": (5, 1)}, r"scale must have shape .* got \[5, 1\]"),
    ({"bias": (12,)}, r"bias must have shape \[out_features\] = \[5\], got \[12\]"),
    ({"lora_a": (12,)}, r"lora_a must have shape \[r, in_features\] = \[r, 12\], got \[12\]"),
    ({"lora_a": (4, 5)}, r"lora_a must have shape .* got \[4, 5\]"),
    ({"lora_b": (4, 5)}, r"lora_b must have shape \[out_features, r\] = \[5, 4\], got \[4, 5\]"),
    ({"lora_b": (5, 3)}, r"lora_b must have shape \[out_features, r\] = \[5, 4\], got \[5, 3\]"),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("shapes", "message"), WRONG_SHAPES)
def test_wrong_shapes(shapes: dict[str, tuple[int, ...]], message: str, impl: str) -> None:
    case = make_case(3, 12, 5)
    wrong = {name: torch.ones(shape, dtype=torch.float64) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        apply(replace(case, **wrong), impl=impl)


@pytest.mark.parametrize(("given", "missing"), [("lora_a", "lora_b"), ("lora_b", "lora_a")])
def test_half_of_the_lora_part(given: str, missing: str) -> None:
    with pytest.raises(ValueError, match=f"belong together: got {given} but {missing} is None"):
        apply(make_case(3, 12, 5), **{missing: None})


@pytest.mark.parametrize("name", ["weight", "blocks", "scale", "lora_a", "lora_b", "bias"])
def test_wrong_device(name: str) -> None:
    case = make_case(3, 12, 5)
    elsewhere = replace(case, **{name: getattr(case, name).to("meta")})
    with pytest.raises(ValueError, match=f"{name} must be on the device of x, cpu, got meta"):
        apply(elsewhere)


@pytest.mark.parametrize("name", ["x", "blocks", "scale", "lora_a", "lora_b", "bias"])
def test_integers(name: str) -> None:
    case = make_case(3, 12, 5)
    whole = replace(case, **{name: getattr(case, name).to(torch.int32)})
    message = rf"{name} must have a floating-point dtype, got torch\.int32"
    with pytest.raises(TypeError, match=message):
        apply(whole)


def test_dtypes_of_x_and_weight() -> None:
    case = make_case(3, 12, 5)
    message = r"same dtype, got torch\.float32 and torch\.float64; cast x, .*autocast"
    with pytest.raises(TypeError, match=message):
        apply(replace(case, x=case.x.float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert apply(replace(case.cast(torch.float32, torch.float32),
                             x=case.x.to(torch.bfloat16))).dtype == torch.bfloat16  # fmt: skip


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, float("nan")])
def test_wrong_dropout(value: float) -> None:
    with pytest.raises(ValueError, match=rf"lora_dropout must be in \[0, 1\), got {value}"):
        apply(make_case(3, 12, 5), lora_dropout=value)


def test_unknown_diagonal() -> None:
    with pytest.raises(ValueError, match=r"diagonal must be one of 'relu', 'free', got 'softplus'"):
        apply(make_case(3, 12, 5), diagonal="softplus")


# --- Dropout. -----------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_is_reproducible_and_changes_from_call_to_call(impl: str) -> None:
    case = make_case(31, 12, 5)
    kwargs = {"lora_dropout": 0.5, "training": True, "impl": impl}
    torch.manual_seed(3)
    first, second = apply(case, **kwargs), apply(case, **kwargs)
    torch.manual_seed(3)
    again = apply(case, **kwargs)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_dropout_draws_the_same_mask_in_every_implementation() -> None:
    case = make_case(31, 12, 5)
    results = []
    for impl in IMPLS:
        torch.manual_seed(3)
        results.append(case.run(lambda c, impl=impl: apply(
            c, lora_dropout=0.5, training=True, impl=impl)))  # fmt: skip
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "changes",
    [{"training": False, "lora_dropout": 0.5}, {"training": True, "lora_dropout": 0.0}],
    ids=["eval", "zero"],
)
def test_dropout_is_off(impl: str, changes: dict[str, Any]) -> None:
    case = make_case(31, 12, 5)
    state = torch.get_rng_state()
    assert torch.equal(apply(case, impl=impl, **changes), apply(case, impl=impl))
    # Nor does it use up random numbers.
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_leaves_what_is_not_lora_alone(impl: str) -> None:
    case = make_case(31, 12, 5)
    without = {"lora_a": None, "lora_b": None}
    state = torch.get_rng_state()
    dropped = apply(case, **without, lora_dropout=0.9, training=True, impl=impl)
    assert torch.equal(dropped, apply(case, **without, impl=impl))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_statistics(impl: str) -> None:
    """With A = B = I the LoRA branch shows the dropped input itself."""
    width, probability = 64, 0.3
    eye = torch.eye(width)
    x = torch.ones(500, width)
    dropped = prodial_linear(
        x, torch.zeros(width, width), blocks=None, scale=None, lora_a=eye, lora_b=eye,
        lora_dropout=probability, training=True, impl=impl,
    )  # fmt: skip
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], torch.full_like(dropped[kept], 1 / 0.7))
    # 32,000 draws: five standard deviations are 0.013.
    assert abs(kept.float().mean().item() - 0.7) < 0.013
    # Independent over tokens and features.
    assert kept.float().mean(0).std() < 0.05
    assert kept.float().mean(1).std() < 0.1


# --- Autocast. ----------------------------------------------------------------------------------


def under_autocast(case: LinearCase, impl: str) -> dict[str, Tensor]:
    def function(case: LinearCase) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return apply(case, impl=impl)

    return case.run(function)


@pytest.mark.parametrize("block_size", [1, 6])
def test_autocast(block_size: int) -> None:
    """fp32 operands under bf16 autocast: bf16 output, fp32 gradients, as accurate as eager."""
    case = make_case((2, 31), 42, 29, block_size=block_size).cast(torch.float32, torch.float32)
    case = replace(case, grad_output=case.grad_output.to(torch.bfloat16))
    result, eager = under_autocast(case, "torch"), under_autocast(case, "reference")
    assert result["output"].dtype == torch.bfloat16
    for name in ("d_x", "d_blocks", "d_scale", "d_lora_a", "d_lora_b", "d_bias"):
        assert result[name].dtype == torch.float32
    exact = case.cast(torch.float64, torch.float64).run(LinearCase.reference)
    assert_all_accurate(result, eager, exact, torch.bfloat16)


def test_autocast_is_that_of_linear() -> None:
    """Which dtype comes out, for every dtype that goes in."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        case = make_case(3, 12, 5).cast(dtype, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            expected = linear(case.x, case.weight, case.bias)
            for impl in IMPLS:
                assert apply(case, impl=impl).dtype == expected.dtype, dtype
        with torch.autocast("cpu", enabled=False):
            for impl in IMPLS:
                assert apply(case, impl=impl).dtype == dtype


@pytest.mark.parametrize("forward", [True, False], ids=["forward-in-autocast", "forward-plain"])
def test_autocast_around_backward_changes_nothing(forward: bool) -> None:
    case = make_case(31, 42, 29, block_size=6).cast(torch.float32, torch.float32)

    def gradients(*, backward: bool) -> list[Tensor]:
        leaves = [getattr(case, name).detach().requires_grad_() for name in LinearCase.TRAINED]
        copy = replace(case, **dict(zip(LinearCase.TRAINED, leaves, strict=True)))
        with torch.autocast("cpu", torch.bfloat16, enabled=forward):
            loss = (apply(copy, impl="torch").float() * case.grad_output).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=backward):
            loss.backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    inside, outside = gradients(backward=True), gradients(backward=False)
    assert len(inside) == len(outside) == len(LinearCase.TRAINED)
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_channel_first_is_the_transposed_contiguous_output(impl: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    adapter = {
        "blocks": torch.randn(4, 2, 2, dtype=torch.float64) * 0.1,
        "scale": torch.rand(6, dtype=torch.float64),
        "lora_a": torch.randn(3, 8, dtype=torch.float64),
        "lora_b": torch.randn(6, 3, dtype=torch.float64),
    }
    weight = torch.randn(6, 8, dtype=torch.float64)
    rows = prodial_linear(x, weight, **adapter, impl=impl)
    first = prodial_linear(x, weight, **adapter, impl=impl, channel_first=True)
    assert first.shape == (2, 6, 5)
    assert first.is_contiguous()
    torch.testing.assert_close(first, rows.transpose(1, 2), rtol=0, atol=0)
    grad = torch.randn_like(first)
    (expected,) = torch.autograd.grad(rows, x, grad.transpose(1, 2))
    (got,) = torch.autograd.grad(first, x, grad)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_every_part_may_be_left_out() -> None:
    case = make_case(7, 12, 5)
    assert torch.equal(
        prodial_linear(case.x, case.weight), torch.nn.functional.linear(case.x, case.weight)
    )
    expected = apply(case, blocks=None, scale=None, bias=None)
    found = prodial_linear(
        case.x, case.weight, lora_a=case.lora_a, lora_b=case.lora_b, lora_scaling=case.lora_scaling
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (float("nan"), ValueError, "lora_scaling must be a finite number .* got nan"),
        (float("-inf"), ValueError, "lora_scaling must be a finite number .* got -inf"),
        ("1", TypeError, "lora_scaling must be a number, got '1'"),
        (None, TypeError, "lora_scaling must be a number, got None"),
        (True, TypeError, "lora_scaling must be a number, got True"),
    ],
)
def test_a_scaling_that_is_no_finite_number(
    value: object, error: type[Exception], message: str, impl: str
) -> None:
    with pytest.raises(error, match=message):
        apply(make_case(7, 12, 5), lora_scaling=value, impl=impl)
