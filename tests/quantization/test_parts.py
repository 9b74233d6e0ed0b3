"""Parts of stored weights: rows looked up or cut out, one of several, experts by their tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import quantize_linear
from prodial_kernels.models.layers.head import StoredMatrix
from prodial_kernels.quantization import FORMATS, QuantizedLinear
from prodial_kernels.quantization.modules import routing
from prodial_kernels.quantization.modules.counting import stored_bytes
from prodial_kernels.quantization.modules.embedding import QuantizedEmbedding
from prodial_kernels.quantization.modules.experts import QuantizedExperts, QuantizedStack
from prodial_kernels.quantization.nf4 import NF4Linear
from prodial_kernels.training.step.chunked_loss import chunked_cross_entropy, chunked_losses

# Rows that end within a block, within a byte, and at both.
SHAPES = [(50, 96), (37, 33), (130, 257), (9, 64), (300, 128)]


def layer_of(format: str, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    linear = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    return quantize_linear(linear, format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_those_of_the_dense_weight(
    format: str, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(format, shape).to(dtype)
    dense = layer.dequantize()
    ids = torch.tensor([[0, shape[0] - 1, 3], [3, 5, 1]])
    with monkeypatch.context() as patch:
        # No more is made dense than what is looked up.
        patch.setattr(QuantizedLinear, "unpack", None)
        found = layer.lookup(ids)
    assert found.dtype == dtype
    assert torch.equal(found, dense[ids])


def test_rows_of_scales_that_are_not_quantised_themselves() -> None:
    layer = NF4Linear.quantize(torch.randn(24, 50), None, double_quantization=False)
    ids = torch.arange(24)
    assert torch.equal(layer.lookup(ids), layer.dequantize())
    multiple = layer.row_multiple
    assert multiple == 32
    assert torch.equal(layer_part(layer, 0, 24), layer.dequantize())


def layer_part(layer: QuantizedLinear, start: int, stop: int) -> Tensor:
    return layer.part(start, stop).dequantize()


@pytest.mark.parametrize("shape", [(300, 128), (700, 96), (513, 64)], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_rows_that_are_cut_out_share_their_storage(format: str, shape: tuple[int, int]) -> None:
    layer = layer_of(format, shape)
    dense, multiple = layer.dequantize(), layer.row_multiple
    if multiple < shape[0]:
        part = layer.part(multiple, shape[0])
        assert torch.equal(part.dequantize(), dense[multiple:])
        storages = {t.untyped_storage().data_ptr() for t in layer.packed()}
        assert {t.untyped_storage().data_ptr() for t in part.packed()} <= storages
        assert torch.equal(layer_part(layer, 0, multiple), dense[:multiple])
    for wrong in ((0, shape[0] + 1), (5, 5), (1, shape[0])):
        if wrong[0] % multiple or wrong[1] > shape[0] or wrong[0] == wrong[1]:
            with pytest.raises(ValueError, match=f"multiples of {multiple} within"):
                layer.part(*wrong)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_bytes_are_counted_beforehand(format: str, shape: tuple[int, int]) -> None:
    layer = layer_of(format, shape)
    assert stored_bytes(format, *shape) == layer.packed_bytes
    stack = QuantizedStack(3, layer)
    assert stored_bytes(format, *shape, 3) == stack.packed_bytes


def test_an_unknown_format_has_no_bytes() -> None:
    with pytest.raises(ValueError, match="format must be nf4, int8 or fp8"):
        stored_bytes("fp4", 8, 8)


@pytest.mark.parametrize("format", FORMATS)
def test_a_stack_holds_each_weight_by_itself(format: str) -> None:
    layers = [quantize_linear(nn.Linear(96, 40, bias=False), format) for _ in range(4)]
    stack = QuantizedStack(4, layers[0])
    for index, layer in enumerate(layers):
        assert index in stack.missing
        stack.put(index, layer)
    assert not stack.missing
    for one, layer in zip(stack, layers, strict=True):
        assert torch.equal(one.dequantize(), layer.dequantize())
    expected = torch.stack([layer.dequantize() for layer in layers])
    assert torch.equal(stack.dequantize(), expected)
    out = torch.empty(2, 40, 96)
    stack.unpack_some(torch.tensor([3, 1]), [3, 1], out)
    assert torch.equal(out, expected[[3, 1]])
    cast = stack.to(torch.bfloat16)
    assert torch.equal(cast.dequantize(), expected.bfloat16())
    with pytest.raises(IndexError, match="index must be in"):
        stack[4]
    other = NF4Linear.quantize(torch.randn(40, 96), None, double_quantization=False)
    with pytest.raises(ValueError, match="stored in another way"):
        stack.put(0, other)


class Experts(nn.Module):
    """As transformers has them; ``gated`` or not."""

    def __init__(self, gated: bool, experts: int = 6, width: int = 24, inner: int = 40) -> None:
        super().__init__()
        self.num_experts, self.has_gate = experts, gated
        self.act_fn = nn.SiLU()
        first = "gate_up_proj" if gated else "up_proj"
        self.register_parameter(
            first, nn.Parameter(torch.randn(experts, inner * (1 + gated), width) * 0.2)
        )
        self.down_proj = nn.Parameter(torch.randn(experts, width, inner) * 0.2)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Every token by itself."""
        rows = []
        for m in range(len(x)):
            total = torch.zeros_like(x[m])
            for expert, weight in zip(chosen[m].tolist(), weights[m], strict=True):
                if self.has_gate:
                    gate, up = (self.gate_up_proj[expert] @ x[m]).chunk(2)
                    inner = self.act_fn(gate) * up
                else:
                    inner = self.act_fn(self.up_proj[expert] @ x[m])
                total = total + weight * (self.down_proj[expert] @ inner)
            rows.append(total)
        return torch.stack(rows)


def stored_experts(experts: Experts, format: str = "nf4") -> QuantizedExperts:
    stacks = {}
    for name, weight in experts.named_parameters():
        for index, dense in enumerate(weight.detach()):
            linear = nn.Linear(1, 1, bias=False)
            linear.weight = nn.Parameter(dense)
            layer = quantize_linear(linear, format)
            stacks.setdefault(name, QuantizedStack(len(weight), layer)).put(index, layer)
    return QuantizedExperts(experts, stacks)


@pytest.mark.parametrize("group", [1, 2**27])
@pytest.mark.parametrize("gated", [False, True])
def test_experts_and_their_gradients(
    gated: bool, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64 against every token by itself; some experts have no token, one has many."""
    monkeypatch.setattr(routing, "GROUP_BYTES", group)
    torch.manual_seed(0)
    stored = stored_experts(Experts(gated)).double()
    plain: Any = stored.to_plain()
    chosen = torch.tensor([[0, 4], [4, 0], [5, 4], [4, 2], [2, 4]])
    results = []
    for module in (stored, plain):
        torch.manual_seed(1)
        x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
        weights = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
        out = module(x, chosen, weights)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out))
        results.append((out.detach(), x.grad, weights.grad))
    for found, expected in zip(*results, strict=True):
        assert expected.count_nonzero() > 0
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_no_input_of_an_expert_is_kept() -> None:
    stored = stored_experts(Experts(True, width=32, inner=48))
    x = torch.randn(64, 32, requires_grad=True)
    chosen = torch.randint(6, (64, 2))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        stored(x, chosen, torch.rand(64, 2))
    sizes = {tuple(tensor.shape) for tensor in kept}
    # Gate and up, what becomes of them, the last product and the weights of the choices.
    assert sizes == {(128, 48), (128, 32), (64, 2)}


@pytest.mark.parametrize("vocabulary", [300, 1031])
@pytest.mark.parametrize("format", FORMATS)
def test_a_stored_head_is_dense_a_few_rows_at_a_time(
    format: str, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(format, (vocabulary, 64))
    monkeypatch.setattr("prodial_kernels.models.layers.head.PART_ELEMENTS", 64 * 128)
    matrix, dense = StoredMatrix(layer), layer.dequantize()
    parts = [(rows, part.clone()) for rows, part in matrix.parts()]
    assert torch.equal(torch.cat([part for _, part in parts]), dense)
    assert len(parts) == -(-vocabulary // max(128, layer.row_multiple))
    torch.manual_seed(2)
    targets = torch.randint(vocabulary, (37,))
    targets[5] = -100
    bias = torch.randn(vocabulary)
    found = []
    for weight in (matrix, dense):
        torch.manual_seed(3)
        hidden = torch.randn(37, 64, requires_grad=True)
        loss = chunked_cross_entropy(
            hidden, weight, bias, targets, None, weight=0.5, scale=0.7, rows=16
        )
        loss.backward()
        each = chunked_losses(hidden.detach(), weight, bias, targets, scale=0.7, rows=16)
        found.append((loss.detach(), hidden.grad, each))
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)


def test_an_embedding_that_is_not_tied_moves_its_table() -> None:
    embedding = QuantizedEmbedding(layer_of("nf4", (12, 64)), tied=False, padding_idx=0)
    other = QuantizedEmbedding(layer_of("nf4", (12, 64)), tied=False, padding_idx=0)
    nn.init.zeros_(other.table.absmax)
    other.load_state_dict(embedding.state_dict())
    ids = torch.tensor([3, 0])
    assert torch.equal(other(ids), embedding(ids))
    assert embedding.to(torch.float16)(ids).dtype == torch.float16
    assert torch.equal(embedding.to_plain().weight, embedding.weight)
    assert "format='nf4'" in repr(embedding)
