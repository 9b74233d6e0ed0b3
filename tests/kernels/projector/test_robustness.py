"""Sizes, layouts and values at the edges: interpreted, and with ``-m gpu`` on a device."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from prodial_kernels import prodial_linear
from prodial_kernels._validation import _remembered_capability, triton_obstacle
from prodial_kernels.kernels.projector import passes
from prodial_kernels.kernels.replay import recorded_calls
from prodial_kernels.testing import LinearCase, make_case
from support.kernels.kernel_cases import (
    assert_matches_fp64,
    dropout_mask,
    gradients_of,
    triton_linear,
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("the Triton interpreter is off where there is a GPU")
    return request.param


def compute_dtype(device: str) -> torch.dtype:
    """The interpreter computes bf16 wrongly (triton-lang/triton#11584), so it sees fp16."""
    return torch.float16 if device == "cpu" else torch.bfloat16


def call(x: Tensor, case: LinearCase, dropout: float) -> Tensor:
    return prodial_linear(
        x, case.weight, blocks=case.blocks, scale=case.scale, lora_a=case.lora_a,
        lora_b=case.lora_b, bias=case.bias, lora_dropout=dropout, training=True, impl="triton",
    )  # fmt: skip


# Every number of tokens meets another block size and rank; ranks straddle the powers of two.
SIZES = [
    # M, K, N, P, r
    (0, 24, 17, 6, 1),
    (1, 36, 31, 12, 2),
    (2, 50, 33, 1, 8),
    (63, 48, 40, 24, 16),
    (129, 48, 21, 48, 17),
    (3, 96, 67, 96, 64),
    (5, 128, 35, 128, 65),
    (2, 30, 16, 6, 100),
    (4, 21, 8, 3, 128),
    (2, 24, 9, 1, 256),
    (7, 192, 20, 96, 256),
]


@pytest.mark.parametrize(("m", "k", "n", "block_size", "r"), SIZES, ids=str)
def test_every_size(device: str, m: int, k: int, n: int, block_size: int, r: int) -> None:
    case = make_case(m, k, n, block_size=block_size, r=r, device=device)
    assert_matches_fp64(case, compute=compute_dtype(device))


@pytest.mark.parametrize("block_size", [72, 192], ids=lambda size: f"P=K={size}")
def test_one_dense_block(device: str, block_size: int) -> None:
    case = make_case(9, block_size, 40, block_size=block_size, r=4, device=device)
    assert_matches_fp64(case, compute=compute_dtype(device))


def subsets(device: str) -> list[tuple[str, ...]]:
    """Every choice of gradients; interpreted, those in which any three occur in every way."""
    most = len(LinearCase.TRAINED)
    return [
        subset
        for size in (range(most + 1) if device == "cuda" else (0, 1, most - 1, most))
        for subset in itertools.combinations(LinearCase.TRAINED, size)
    ]


def test_every_subset_of_the_gradients_is_that_of_all(device: str) -> None:
    case = make_case(9, 12, 20, block_size=6, r=3, device=device)
    case = case.cast(compute_dtype(device), torch.float32)
    everything = gradients_of(case, triton_linear, LinearCase.TRAINED)
    for subset in subsets(device):
        for name, tensor in gradients_of(case, triton_linear, subset).items():
            assert torch.equal(tensor, everything[name]), (name, subset)


def test_leading_shapes_row_strides_and_a_channel_first_gradient(device: str) -> None:
    dtype = compute_dtype(device)
    case = make_case((2, 3, 5), 24, 20, block_size=6, device=device).cast(dtype, torch.float32)
    wide = torch.randn(2, 3, 5, 72, device=device).to(dtype)
    layouts = {
        "columns of wider rows": wide[..., 24:48],
        "an odd offset": wide[..., 5:29],
        "every second row": torch.randn(2, 3, 10, 24, device=device).to(dtype)[:, :, ::2],
        "channels first": torch.randn(2, 3, 24, 5, device=device).to(dtype).transpose(-1, -2),
        "expanded": wide[:1, :1, :, :24].expand(2, 3, 5, 24),
    }
    channel_first = case.grad_output.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert channel_first.stride(-1) == 5
    for name, x in layouts.items():
        assert_matches_fp64(replace(case, x=x), compute=dtype)
        if name in ("an odd offset", "channels first"):
            assert_matches_fp64(replace(case, x=x, grad_output=channel_first), compute=dtype)


def test_a_channel_first_gradient_of_a_matrix(device: str) -> None:
    """Without leading dimensions autograd hands the gradient on in the layout it came in."""
    dtype = compute_dtype(device)
    case = make_case(15, 24, 20, block_size=6, device=device).cast(dtype, torch.float32)
    case = replace(case, grad_output=case.grad_output.T.contiguous().T)
    assert case.grad_output.stride() == (1, 15)
    assert_matches_fp64(case, compute=dtype)


def test_channel_first_output(device: str) -> None:
    dtype = compute_dtype(device)
    case = make_case((2, 7), 24, 20, block_size=6, device=device).cast(dtype, torch.float32)
    expected = gradients_of(case, triton_linear, LinearCase.TRAINED)
    # As a scan's backward would hand it over: [b, N, l], contiguous.
    gradient = case.grad_output.transpose(-1, -2).contiguous()
    result = gradients_of(
        replace(case, grad_output=gradient),
        lambda c: triton_linear(c, channel_first=True),
        LinearCase.TRAINED,
    )
    assert result["output"].shape == (2, 20, 7)
    assert result["output"].is_contiguous()
    result["output"] = result["output"].transpose(-1, -2)
    assert_close_to(result, expected, dtype)


def assert_close_to(
    result: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Equal but for the order of the sums, which another layout may change."""
    for name, tensor in result.items():
        largest = float(expected[name].float().abs().max())
        torch.testing.assert_close(
            tensor, expected[name], rtol=0, atol=4 * torch.finfo(dtype).eps * largest
        )


def test_scales_where_the_division_would_fail(device: str) -> None:
    dtype = compute_dtype(device)
    case = make_case(70, 24, 66, block_size=6, device=device)
    assert case.scale is not None
    odd = [0.0, -0.0, -1.0, 1e-3, -1e-6, 1e-20, -1e-30, 1e-38, 1.0, 64.0, -300.0]
    case.scale[: len(odd)] = torch.tensor(odd, dtype=case.scale.dtype, device=device)
    assert_matches_fp64(case, compute=dtype)
    case.scale.zero_()
    assert_matches_fp64(case, compute=dtype, trained=("scale",))
    # Y is all bias and low rank: nothing of U Wᵀ is left in it to divide out.
    case.scale.fill_(1e-7)
    assert_matches_fp64(case, compute=dtype, trained=("scale", "bias", "lora_b"))
    # More spans of X than programs for them, so each adds up some.
    wide = make_case(33, 1160, 24, block_size=1, device=device)
    assert wide.scale is not None
    wide.scale.zero_()
    assert_matches_fp64(wide, compute=dtype, trained=("scale",))


# numpy warns where the interpreter multiplies infinity by zero.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("where", ["x", "grad_output", "weight", "scale", "lora_a", "bias"])
def test_what_is_not_finite_is_passed_on(device: str, where: str, value: float) -> None:
    """Where the definition is not finite the kernels are not; other rows stay as they are."""
    case = make_case(5, 12, 20, block_size=6, r=3, device=device)
    case = case.cast(compute_dtype(device), torch.float32)
    clean = gradients_of(case, triton_linear, LinearCase.TRAINED)
    getattr(case, where).view(-1)[7 % getattr(case, where).numel()] = value
    expected = gradients_of(case, LinearCase.reference, LinearCase.TRAINED)
    result = gradients_of(case, triton_linear, LinearCase.TRAINED)
    for name, tensor in result.items():
        spoilt = ~expected[name].isfinite()
        assert not tensor[spoilt].isfinite().any(), name
        if where in ("x", "grad_output") and name in ("output", "d_x"):
            rows = tensor.isfinite().all(-1)
            assert int(rows.sum()) >= 4, name
            assert torch.equal(tensor[rows], clean[name][rows]), name


@pytest.mark.parametrize(
    ("r", "k", "block_size"), [(3, 36, 6), (3, 192, 96), (70, 36, 1), (70, 192, 96)]
)
def test_dropout_matches_fp64_under_its_mask(device: str, r: int, k: int, block_size: int) -> None:
    dtype, p = compute_dtype(device), 0.25
    mask = dropout_mask(33, k, p, device=device, dtype=dtype)
    assert 0.65 < mask.float().mean() < 0.85
    case = make_case(33, k, 21, block_size=block_size, r=r, device=device)
    case = replace(case, dropout_mask=mask, lora_dropout=p)
    assert_matches_fp64(case, compute=dtype)


def test_dropout_mask_is_random_in_every_direction(device: str) -> None:
    mask = dropout_mask(64, 96, 0.5, device=device, dtype=compute_dtype(device)).float() - 0.5
    assert abs(float(mask.mean())) < 6 * 0.5 / math.sqrt(mask.numel())
    # Neighbours in a row and in a column agree half of the time: 6 standard deviations.
    for step in ((0, 1), (1, 0), (1, 1), (0, 4), (16, 0)):
        product = mask[step[0] :, step[1] :] * mask[: 64 - step[0], : 96 - step[1]] * 4
        assert abs(float(product.mean())) < 6 / math.sqrt(product.numel()), step


def test_selective_checkpointing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(9, 12, 20, block_size=6, r=3, device=device)
    case = case.cast(compute_dtype(device), torch.float32)
    leaves = {name: getattr(case, name).requires_grad_() for name in LinearCase.TRAINED}
    operator = torch.ops.prodial_kernels.linear_forward.default
    runs: list[str] = []
    forward = passes.forward
    monkeypatch.setattr(passes, "forward", lambda *a: (runs.append("forward"), forward(*a))[1])
    # From a recording, the function that is counted would not run.
    monkeypatch.setattr(recorded_calls, "hooked", lambda: True)

    def run(policy: CheckpointPolicy | None) -> dict[str, Tensor]:
        def choose(context: Any, function: Any, *_: Any, **__: Any) -> CheckpointPolicy:
            chosen = policy if function is operator else None
            return chosen or CheckpointPolicy.PREFER_RECOMPUTE

        def function(x: Tensor) -> Tensor:
            return call(x, case, 0.5).sin()

        runs.clear()
        torch.manual_seed(5)
        if policy is None:
            output = function(case.x)
        else:
            # The mask's seed is drawn inside, so recomputing has to draw the same again,
            output = checkpoint(
                function, case.x, use_reentrant=False,
                context_fn=lambda: create_selective_checkpoint_contexts(choose),
            )  # fmt: skip
        # whatever is drawn in between.
        torch.rand(7, device=device)
        found = torch.autograd.grad(output, list(leaves.values()), case.grad_output)
        return {"output": output, **dict(zip(leaves, found, strict=True))}

    expected = run(None)
    for policy, times in (
        (CheckpointPolicy.MUST_SAVE, 1),
        (CheckpointPolicy.MUST_RECOMPUTE, 2),
    ):
        result = run(policy)
        assert len(runs) == times, policy
        for name, tensor in expected.items():
            assert torch.equal(tensor, result[name]), (name, policy)


def test_autocast_with_wide_masters(device: str) -> None:
    """x, weight and bias in fp32, cast by autocast as ``F.linear`` would; gradients come wide."""
    dtype = compute_dtype(device)
    case = make_case(9, 24, 20, block_size=6, device=device).cast(torch.float32, torch.float32)
    case = replace(case, grad_output=case.grad_output.to(dtype))
    with torch.autocast(device, dtype):
        result = gradients_of(case, triton_linear, LinearCase.TRAINED)
    assert result["output"].dtype is dtype
    assert {result[f"d_{name}"].dtype for name in LinearCase.TRAINED} == {torch.float32}
    assert_matches_fp64(case, compute=dtype)
    plain = gradients_of(case.cast(dtype, torch.float32), triton_linear, LinearCase.TRAINED)
    for name, tensor in plain.items():
        assert torch.equal(result[name].to(tensor.dtype), tensor), name


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compile_is_one_graph_for_every_number_of_tokens(device: str, dropout: float) -> None:
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for tokens in (5, 33, 12):
        case = make_case((2, tokens), 12, 20, block_size=6, r=3, device=device)
        case = case.cast(compute_dtype(device), torch.float32)
        torch._dynamo.mark_dynamic(case.x, 1)
        results = []
        for function in (call, compiled):
            torch.manual_seed(4)
            leaves = [case.x, case.blocks, case.scale, case.lora_a, case.lora_b, case.bias]
            for leaf in leaves:
                leaf.requires_grad_()
            output = function(case.x, case, dropout)
            results.append([output, *torch.autograd.grad(output, leaves, case.grad_output)])
        for eager, traced in zip(*results, strict=True):
            assert torch.equal(eager, traced)
    assert backend.frame_count == 1


@pytest.mark.parametrize("absent", [(), ("blocks", "bias"), ("lora_a", "lora_b"), ("scale",)])
def test_operators_pass_opcheck(device: str, absent: tuple[str, ...]) -> None:
    from prodial_kernels.ops import operators

    assert operators
    case = make_case(9, 12, 20, block_size=6, r=3, device=device)
    case = replace(case.cast(compute_dtype(device), torch.float32), **dict.fromkeys(absent))
    seed = None if case.lora_a is None else torch.tensor([3], device=device)
    operands = (
        case.x, case.weight, case.blocks, case.scale_deviation, case.lora_a, case.lora_b, case.bias,
        seed,
    )  # fmt: skip
    options = (0.5, 0.25 if seed is not None else 0.0, True)
    operators = torch.ops.prodial_kernels
    torch.library.opcheck(operators.linear_forward.default, (*operands, *options, 0))
    y, h = operators.linear_forward(*operands, *options, 0)
    needs = [getattr(case, name) is not None for name in LinearCase.TRAINED]
    for asked in (needs, [True, *[False] * 5]):
        kept_h = None if case.lora_a is None else h
        torch.library.opcheck(
            operators.linear_backward.default,
            (case.grad_output, *operands, y, kept_h, None, *options, *asked),
        )


# --- Refusals. ----------------------------------------------------------------------------------


def test_a_cpu_tensor_is_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = make_case(3, 6, 5).cast(torch.bfloat16, torch.float32)
    with pytest.raises(RuntimeError, match=r"x is on cpu.*need a CUDA device.*impl='torch'"):
        triton_linear(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_wide_dtype_is_refused(device: str, dtype: torch.dtype) -> None:
    case = make_case(3, 6, 5, device=device).cast(dtype, dtype)
    with pytest.raises(TypeError, match=rf"{dtype}.*float16 and bfloat16.*impl='torch'"):
        triton_linear(case)


def test_a_device_before_ampere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    with FakeTensorMode():
        x = torch.empty(2, 3, dtype=torch.float16, device="cuda")
    _remembered_capability.cache_clear()
    assert triton_obstacle(x) == "Tesla T4 is older than Ampere (sm_80)"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    _remembered_capability.cache_clear()
    assert triton_obstacle(x) is None
    _remembered_capability.cache_clear()


@pytest.mark.parametrize("name", ["weight", "blocks", "scale", "lora_a", "lora_b", "bias"])
def test_operands_on_another_device_are_named(device: str, name: str) -> None:
    case = make_case(3, 6, 5, device=device).cast(compute_dtype(device), torch.float32)
    elsewhere = getattr(case, name).to("meta")
    with pytest.raises(ValueError, match=f"{name} must be on the device of x"):
        triton_linear(replace(case, **{name: elsewhere}))
