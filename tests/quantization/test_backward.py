"""What a quantised layer keeps for backward, and that backward belongs to the weight of forward."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prodial_kernels.quantization import FORMATS, quantize_linear
from support.quantized_layers import K, N, adapted, dense_weights, kept_by, quantised


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("format", FORMATS)
def test_ledger(format: str, impl: str, kernel_device: str) -> None:
    """X, H, with the kernels Y, aliases of the adapter and of the packed weight: nothing else."""
    dtype = torch.float16 if impl == "triton" else torch.float32
    layer = adapted(quantised(format, dtype=dtype).to(kernel_device), impl=impl)
    x = torch.randn(1, 5, K, device=kernel_device, dtype=dtype, requires_grad=True)
    outputs: list[Tensor] = []
    kept = kept_by(lambda: outputs.append(layer(x)))
    assert dense_weights() == 0
    own = {p.data_ptr() for p in (*layer.parameters(), *layer.buffers())}
    fresh = [tensor for tensor in kept if not tensor.is_meta and tensor.data_ptr() not in own]
    activations = {x.data_ptr(), outputs[0].data_ptr()}
    h = [tensor for tensor in fresh if tensor.data_ptr() not in activations]
    assert [tensor.shape[0] for tensor in h] == [5]
    assert h[0].shape[1] <= 16
    assert len(fresh) == (3 if impl == "triton" else 2)
    outputs[0].float().sum().backward()
    assert dense_weights() == 0


def test_a_layer_without_an_adapter_keeps_its_packed_weight_alone() -> None:
    layer = quantised("nf4")
    x = torch.randn(2, 5, K, requires_grad=True)
    kept = kept_by(lambda: layer(x))
    own = {p.data_ptr() for p in (*layer.parameters(), *layer.buffers())}
    assert {tensor.data_ptr() for tensor in kept if not tensor.is_meta} <= own
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(y, nn.functional.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(dx, torch.ones_like(y) @ layer.weight)
    assert layer.bias is not None
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((N,), 10.0))


def test_frozen_adapters_keep_no_input() -> None:
    layer = adapted(quantised()).requires_grad_(False)
    x = torch.randn(2, 5, K, requires_grad=True)
    assert all(tensor.data_ptr() != x.data_ptr() for tensor in kept_by(lambda: layer(x)))
    (dx,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(dx, torch.ones(2, 5, N) @ layer.weight)


def test_one_dense_weight_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However deep the model: the temporary of a layer is gone before the next one's."""
    model = nn.Sequential(*(adapted(quantised(shape=(K, K))) for _ in range(4)))
    alive: list[int] = []
    unpack = type(model[0].base_layer).unpack

    def counted(self: Any, *args: Any) -> Tensor:
        alive.append(dense_weights((K, K)))
        return unpack(self, *args)

    monkeypatch.setattr(type(model[0].base_layer), "unpack", counted)
    model(torch.randn(3, K)).sum().backward()
    assert alive == [0] * 8


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_threads_and_changes_before_backward(reentrant: bool) -> None:
    layer = adapted(quantised(), lora_dropout=0.3).train()
    x = torch.randn(2, 5, K, requires_grad=True)

    def gradients(call: Any) -> list[Tensor]:
        torch.manual_seed(1)
        y = call(x)
        return list(torch.autograd.grad(y.square().sum(), [x, *trained]))

    trained = [p for _, p in layer.adapter_parameters()]
    expected = gradients(layer)
    if not reentrant:
        again = gradients(lambda x: checkpoint(layer, x, use_reentrant=False))
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    else:
        torch.manual_seed(1)
        checkpoint(layer, x, use_reentrant=True).square().sum().backward()
        found = [x.grad, *(p.grad for p in trained)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    layer.eval()
    alone = gradients(layer)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: gradients(layer), range(8)):
            assert all(torch.equal(a, b) for a, b in zip(result, alone, strict=True))
    # Backward belongs to the weight that forward saw, whatever the layer holds by then.
    y = layer(x)
    layer.base_layer.load_state_dict(quantize_linear(nn.Linear(K, N), "nf4").state_dict())
    found = torch.autograd.grad(y.square().sum(), [x, *trained])
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    y = layer(x)
    layer.base_layer.codes.zero_()
    with pytest.raises(RuntimeError, match="modified in place between forward and backward"):
        y.sum().backward()
