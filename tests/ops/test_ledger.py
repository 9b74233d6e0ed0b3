"""What ``impl="torch"`` allocates and keeps: W' is never formed, and nothing of its size is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prodial_kernels import ProdialLinear, prodial_linear
from prodial_kernels.ops.reference import effective_weight
from prodial_kernels.testing import LinearCase, make_case

# N·K and K·K exceed every other size: M·K, M·N, G·P·P, R·K, R·N.
TOKENS, IN, OUT, R = 17, 42, 29, 4


class Allocations(TorchDispatchMode):
    """Records every tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.tensors.append((str(func), leaf))
        return result

    def as_large_as(self, weight: Tensor) -> list[tuple[str, list[int]]]:
        """What is at least as large as ``weight`` without being a view of it."""
        own = weight.untyped_storage().data_ptr()
        return [
            (name, list(tensor.shape))
            for name, tensor in self.tensors
            if tensor.numel() >= weight.numel() and tensor.untyped_storage().data_ptr() != own
        ]


def fused(case: LinearCase) -> Tensor:
    return prodial_linear(
        case.x, case.weight, blocks=case.blocks, scale=case.scale, lora_a=case.lora_a,
        lora_b=case.lora_b, bias=case.bias, lora_scaling=case.lora_scaling, lora_dropout=0.3,
        training=True, diagonal=case.diagonal, impl="torch",
    )  # fmt: skip


def materialised(case: LinearCase) -> Tensor:
    adapted = effective_weight(
        case.weight, case.blocks, case.scale_deviation, case.lora_a, case.lora_b, 1.0, case.diagonal
    )
    return torch.nn.functional.linear(case.x, adapted, case.bias)


def record(case: LinearCase, function: Callable[[LinearCase], Tensor]) -> Allocations:
    with Allocations() as allocations:
        case.run(function)
    return allocations


@pytest.fixture(params=[1, 6, 42], ids=lambda size: f"P={size}")
def case(request: pytest.FixtureRequest) -> LinearCase:
    block_size = request.param
    return make_case(TOKENS, IN, OUT, block_size=block_size, r=R).cast(
        torch.bfloat16, torch.float32
    )


def test_the_recorder_sees_a_materialised_weight(case: LinearCase) -> None:
    found = record(case, materialised).as_large_as(case.weight)
    assert any(shape == [OUT, IN] for _, shape in found)


@pytest.mark.parametrize("absent", [(), ("blocks",), ("scale",), ("lora_a", "lora_b")], ids=str)
def test_nothing_of_the_weights_size_is_allocated(absent: tuple[str, ...]) -> None:
    for block_size in (1, 6):
        full = make_case(TOKENS, IN, OUT, block_size=block_size, r=R)
        case = replace(full.cast(torch.bfloat16, torch.float32), **dict.fromkeys(absent))
        allocations = record(case, fused)
        assert any(tensor.shape == (TOKENS, OUT) for _, tensor in allocations.tensors)
        assert allocations.as_large_as(case.weight) == []


def saved_by(case: LinearCase, **asked: bool) -> list[Tensor]:
    """Every tensor that autograd keeps between forward and backward."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    leaves = {
        name: getattr(case, name).detach().requires_grad_(asked.get(name, True))
        for name in LinearCase.TRAINED
    }
    case = replace(case, **leaves)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused(case)
    own = {
        getattr(case, name).untyped_storage().data_ptr()
        for name in ("x", "weight", "blocks", "scale", "lora_a", "lora_b")
    }
    return [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in own]


def test_backward_keeps_h_and_the_mask_beyond_the_operands(case: LinearCase) -> None:
    extra = saved_by(case)
    assert sorted((list(t.shape), t.dtype) for t in extra) == [
        ([TOKENS, R], torch.bfloat16),
        ([TOKENS, IN], torch.bool),
        ([OUT], torch.float32),  # s − 1, made of the s that is given here
    ]


def test_of_a_layer_backward_keeps_no_scale_beyond_the_parameter() -> None:
    layer = ProdialLinear(torch.nn.Linear(IN, OUT), r=R, block_size=6)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(TOKENS, IN))
    own = {tensor.untyped_storage().data_ptr() for tensor in layer.state_dict().values()}
    extra = [t.shape for t in kept if t.untyped_storage().data_ptr() not in own]
    assert sorted(extra) == [(TOKENS, R), (TOKENS, IN)]  # H and X


@pytest.mark.parametrize(
    ("asked", "products"),
    [
        (("x", "blocks", "scale", "lora_a", "lora_b", "bias"), 2),
        (("x",), 1),
        (("blocks",), 1),
        (("scale",), 1),
        (("x", "blocks"), 1),
        (("lora_a", "lora_b"), 0),
        (("bias",), 0),
    ],
    ids=str,
)
def test_backward_multiplies_by_the_weight_only_where_it_must(
    asked: tuple[str, ...], products: int
) -> None:
    case = make_case(TOKENS, IN, OUT, block_size=6, r=R)
    leaves = {name: getattr(case, name).detach() for name in LinearCase.TRAINED}
    for name in asked:
        leaves[name].requires_grad_()
    output = fused(replace(case, **leaves))
    with Allocations() as allocations:
        torch.autograd.grad(output, [leaves[name] for name in asked], case.grad_output)
    # dU = g W is [M, K] and U Wᵀ is [M, N]; the LoRA products towards x are [M, K] as well.
    large = [
        list(tensor.shape)
        for name, tensor in allocations.tensors
        if name == "aten.mm.default" and tensor.shape[1] > R and tensor.shape[0] == TOKENS
    ]
    low_rank = "x" in asked
    assert len(large) == products + low_rank, large


@pytest.mark.parametrize("lead", [(), (17,), (2, 9)], ids=str)
def test_the_output_may_be_overwritten_in_place(lead: tuple[int, ...]) -> None:
    case = make_case(lead, IN, OUT, block_size=6)
    expected = case.run(fused_without_dropout)
    changed = case.run(lambda c: fused_without_dropout(c).mul_(2.0))
    for name, tensor in changed.items():
        torch.testing.assert_close(tensor, 2 * expected[name], rtol=1e-12, atol=1e-12)


def fused_without_dropout(case: LinearCase) -> Tensor:
    return prodial_linear(
        case.x, case.weight, blocks=case.blocks, scale=case.scale, lora_a=case.lora_a,
        lora_b=case.lora_b, bias=case.bias, lora_scaling=case.lora_scaling,
        diagonal=case.diagonal, impl="torch",
    )  # fmt: skip
