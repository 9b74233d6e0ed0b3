"""``prodial_linear`` inside torch.compile, activation checkpointing and autocast together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from prodial_kernels import ProdialLinear, prodial_linear
from prodial_kernels.testing import LinearCase, make_case


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def call(
    x: Tensor, weight: Tensor, blocks: Tensor | None, scale: Tensor | None, lora_a: Tensor | None,
    lora_b: Tensor | None, bias: Tensor | None, dropout: float = 0.0, impl: str = "torch",
) -> Tensor:  # fmt: skip
    return prodial_linear(
        x, weight, blocks=blocks, scale=scale, lora_a=lora_a, lora_b=lora_b, bias=bias,
        lora_scaling=0.5, lora_dropout=dropout, training=True, impl=impl,
    )  # fmt: skip


def run(case: LinearCase, function: Callable[..., Tensor], **kwargs: Any) -> dict[str, Tensor]:
    return case.run(
        lambda c: function(
            c.x, c.weight, c.blocks, c.scale, c.lora_a, c.lora_b, c.bias, **kwargs
        )
    )  # fmt: skip


def assert_same(result: dict[str, Tensor], expected: dict[str, Tensor], **close: float) -> None:
    assert result.keys() == expected.keys()
    for name, tensor in result.items():
        torch.testing.assert_close(
            tensor, expected[name], msg=lambda m, n=name: f"{n}: {m}", **close
        )


@pytest.mark.parametrize(
    ("block_size", "impl"), [(1, "torch"), (6, "torch"), (6, "auto"), (6, "reference")]
)
def test_one_graph_for_every_number_of_tokens(block_size: int, impl: str) -> None:
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=backend)

    def with_dynamic_tokens(x: Tensor, *operands: Tensor, impl: str) -> Tensor:
        torch._dynamo.mark_dynamic(x, 1)
        return compiled(x, *operands, impl=impl)

    for tokens in (5, 64, 33):
        case = make_case((2, tokens), 42, 29, block_size=block_size)
        assert_same(run(case, with_dynamic_tokens, impl=impl), run(case, call, impl=impl))
    assert backend.frame_count == 1


def test_automatic_dynamic_shapes_settle_after_two_graphs() -> None:
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for tokens in (5, 7, 33):
        case = make_case(tokens, 42, 29, block_size=6)
        assert_same(run(case, compiled), run(case, call))
    assert backend.frame_count == 2


@pytest.mark.parametrize("absent", [("blocks",), ("scale",), ("lora_a", "lora_b"), ("bias",)])
def test_compile_without_parts(absent: tuple[str, ...]) -> None:
    case = replace(make_case(9, 42, 29, block_size=6), **dict.fromkeys(absent))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(run(case, compiled), run(case, call))


def test_compile_with_dropout() -> None:
    case = make_case(31, 42, 29, block_size=6)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    expected = run(case, call, dropout=0.5)
    torch.manual_seed(3)
    assert_same(run(case, compiled, dropout=0.5), expected)


def test_compile_under_autocast() -> None:
    case = make_case(31, 42, 29, block_size=6).cast(torch.float32, torch.float32)
    case = replace(case, grad_output=case.grad_output.to(torch.bfloat16))

    def function(*operands: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return call(*operands)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(run(case, compiled), run(case, function))


def test_inductor() -> None:
    case = make_case(31, 42, 29, block_size=6).cast(torch.float32, torch.float32)
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    assert_same(run(case, compiled), run(case, call), rtol=1e-4, atol=1e-5)


def test_compiled_module() -> None:
    torch.manual_seed(0)
    layer = ProdialLinear.from_linear(nn.Linear(42, 29), block_size=6, r=4, lora_dropout=0.3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, 42)
    for train in (True, False):
        layer.train(train)
        torch.manual_seed(1)
        expected = layer(x)
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_activation_checkpointing_replays_dropout(autocast: bool, use_reentrant: bool) -> None:
    case = make_case(31, 42, 29, block_size=6).cast(torch.float32, torch.float32)

    def function(*operands: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return call(*operands, dropout=0.5).float()

    def checkpointed(*operands: Tensor) -> Tensor:
        return checkpoint(function, *operands, use_reentrant=use_reentrant)

    def backward(function: Callable[..., Tensor]) -> dict[str, Tensor]:
        # loss.backward rather than autograd.grad, which reentrant checkpointing refuses.
        leaves = {n: getattr(case, n).detach().clone().requires_grad_() for n in case.TRAINED}
        torch.manual_seed(3)
        copy = replace(case, **leaves)
        output = function(copy.x, copy.weight, copy.blocks, copy.scale, copy.lora_a, copy.lora_b,
                          copy.bias)  # fmt: skip
        # Other random numbers in between must not disturb the replay.
        torch.rand(7)
        output.backward(case.grad_output)
        return {"output": output.detach(), **{n: leaf.grad for n, leaf in leaves.items()}}

    expected, result = backward(function), backward(checkpointed)
    assert result.keys() == expected.keys()
    for name, tensor in result.items():
        assert torch.equal(tensor, expected[name]), name


def test_checkpointing_inside_compile() -> None:
    case = make_case(31, 42, 29, block_size=6)

    def function(*operands: Tensor) -> Tensor:
        return checkpoint(call, *operands, use_reentrant=False)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(run(case, compiled), run(case, call))
