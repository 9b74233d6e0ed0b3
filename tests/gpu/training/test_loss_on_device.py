"""The chunked loss on a GPU: accuracy, memory, CUDA graphs, and what it never does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prodial_kernels.kernels.cross_entropy import cross_entropy_
from prodial_kernels.models.layers.head import OutputHead
from prodial_kernels.testing import assert_all_accurate
from prodial_kernels.training.data.batches import IGNORED
from prodial_kernels.training.step.chunked_loss import chunk_rows
from prodial_kernels.training.step.graphed import CudaGraphs
from prodial_kernels.training.step.loss import ChunkedLoss, FullLoss, Loss, negative_log_likelihoods

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
# Of Mamba's models, padded to a multiple of 8 and not.
VOCABULARIES = (50_280, 50_277)


class _Head(nn.Module):
    """Hidden states are a parameter: a causal language model as the loss sees one."""

    def __init__(self, states: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> None:
        super().__init__()
        self.states = nn.Parameter(states)
        self.lm_head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.lm_head.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.lm_head.bias = nn.Parameter(bias, requires_grad=False)
        self.scale = scale

    def forward(self, input_ids: Tensor) -> Any:
        class Output:
            logits = self.lm_head(self.states) * self.scale

        return Output


def model_of(
    vocabulary: int, tokens: int, width: int, dtype: torch.dtype = torch.bfloat16, *,
    bias: bool = False, scale: float = 1.0,
) -> _Head:  # fmt: skip
    return _Head(
        torch.randn(2, tokens // 2, width, device=DEVICE, dtype=dtype),
        (torch.randn(vocabulary, width, device=DEVICE) * 0.05).to(dtype),
        torch.randn(vocabulary, device=DEVICE, dtype=dtype) if bias else None,
        scale,
    )


def labels_of(vocabulary: int, tokens: int) -> Tensor:
    labels = torch.randint(0, vocabulary, (2, tokens // 2))
    labels[0, : tokens // 8] = IGNORED
    return labels


def chunked(model: _Head, rows: int | None = None) -> ChunkedLoss:
    return ChunkedLoss(OutputHead(model, model.lm_head, model.scale), rows=rows)


def step(model: _Head, loss: Loss, labels: Tensor, weight: Any) -> dict[str, Tensor]:
    """One forward and backward: the loss and every gradient."""
    model.zero_grad(set_to_none=True)
    ids = torch.zeros(labels.shape, dtype=torch.int64, device=DEVICE)
    value = loss(ids, labels, weight, every_position=labels.is_cuda)
    value.backward()
    named = model.named_parameters()
    gradients = {f"d_{name}": p.grad for name, p in named if p.grad is not None}
    return {"loss": value.detach(), **gradients}


@pytest.mark.parametrize("labels_on", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_chunked_loss_keeps_the_accuracy_rule(
    vocabulary: int, dtype: torch.dtype, labels_on: str
) -> None:
    model = model_of(vocabulary, 600, 768, dtype)
    labels = labels_of(vocabulary, 600)
    weight = torch.tensor(1 / 1000, device=DEVICE)
    eager = step(model, FullLoss(model), labels, weight)
    # Chunks that do not divide the number of tokens.
    found = step(model, chunked(model, rows=256), labels.to(labels_on), weight)
    other = copy.deepcopy(model).double()
    exact = step(other, FullLoss(other), labels, weight)
    assert_all_accurate(found, eager, exact, dtype)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_head_that_trains(vocabulary: int) -> None:
    """With a bias and a scale."""
    model = model_of(vocabulary, 400, 128, bias=True, scale=0.37)
    model.requires_grad_(True)
    labels = labels_of(vocabulary, 400).to(DEVICE)
    eager = step(model, FullLoss(model), labels, 1 / 1000)
    found = step(model, chunked(model, rows=128), labels, 1 / 1000)
    other = copy.deepcopy(model).double()
    exact = step(other, FullLoss(other), labels, 1 / 1000)
    assert found.keys() == {"loss", "d_states", "d_lm_head.weight", "d_lm_head.bias"}
    assert_all_accurate(found, eager, exact, torch.bfloat16)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_scores(vocabulary: int) -> None:
    model = model_of(vocabulary, 300, 256)
    labels = torch.randint(0, vocabulary, (300,), device=DEVICE)
    states = model.states.detach().flatten(0, 1)
    exact = functional.cross_entropy(model.lm_head(states).double(), labels, reduction="none")
    head = OutputHead(model, model.lm_head, 1.0)
    found = negative_log_likelihoods(head, states, labels)
    # The products themselves may round otherwise.
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=0.02)
    assert float((found - exact).abs().mean()) < 2e-3


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_it_holds_one_chunk_in_its_dtype(vocabulary: int) -> None:
    """No copy of the chunk, neither by a product nor in fp32."""
    tokens = 8192
    model = model_of(vocabulary, tokens, 256)
    labels = labels_of(vocabulary, tokens).to(DEVICE)
    loss = chunked(model)
    step(model, loss, labels, 1.0)
    model.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(model, loss, labels, 1.0)
    taken = torch.cuda.max_memory_allocated() - before
    chunk = chunk_rows(vocabulary, torch.bfloat16, DEVICE) * vocabulary * 2
    assert chunk <= taken < chunk + 4 * model.states.nbytes + 2**23
    # What it took with an fp32 copy beside half as many rows.
    assert taken < 512 * vocabulary * 6


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_graph_replays_what_runs_launch_by_launch(
    vocabulary: int, record_property: Callable[[str, object], None]
) -> None:
    """On new labels and a new weight, to the last bit; nothing waits for the device."""
    tokens = 2048
    model = model_of(vocabulary, tokens, 2048)
    loss = chunked(model)
    labels = labels_of(vocabulary, tokens).to(DEVICE)
    weight = torch.tensor(1 / 1000, device=DEVICE)
    found: dict[str, Tensor] = {}
    graphs = CudaGraphs(DEVICE)

    def run() -> None:
        found.update(step(model, loss, labels, weight))

    graphs.run(run)
    assert graphs.run_watched(run) == []
    replay = graphs.capture(run)
    labels.copy_(labels_of(vocabulary, tokens))
    weight.fill_(1 / 500)
    replay()
    replayed = {name: tensor.clone() for name, tensor in found.items()}
    graphs.run(run)
    for name, tensor in found.items():
        assert torch.equal(replayed[name], tensor), name
    record_property("microseconds", microseconds(replay))


def microseconds(function: Callable[[], object]) -> float:
    """Of one call; the best of some, as others may use the device too."""
    best = float("inf")
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        best = min(best, 1000 * start.elapsed_time(end))
    return best


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_weight_is_not_rounded(as_tensor: bool) -> None:
    """Hidden states of 16 bits get their gradient times the weight, rounded once."""
    model = model_of(1003, 64, 32)
    labels = labels_of(1003, 64)
    weight = torch.tensor(1 / 30_000_000, device=DEVICE)
    plain = step(model, chunked(model), labels, 1.0)["d_states"]
    found = step(model, chunked(model), labels, weight if as_tensor else 1 / 30_000_000)
    assert torch.equal(found["d_states"], (plain.float() * weight).to(plain.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_dtype_takes_the_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def noted(logits: Tensor, *arguments: Tensor, **options: Any) -> None:
        calls.append(logits.dtype)
        cross_entropy_(logits, *arguments, **options)

    monkeypatch.setattr("prodial_kernels.kernels.cross_entropy.cross_entropy_", noted)
    model = model_of(1003, 64, 32, dtype)
    labels = labels_of(1003, 64)
    found = step(model, chunked(model), labels, 0.01)
    assert calls == [dtype]
    expected = step(model, FullLoss(model), labels, 0.01)
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-2, atol=0)
    step(model.double(), chunked(model), labels, 0.01)
    assert calls == [dtype]


def test_rows_beyond_the_reach_of_32_bits() -> None:
    rows, vocabulary = 43_000, 50_304
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device=DEVICE)
    assert logits.numel() > 2**31
    logits[-1] = torch.randn(vocabulary, device=DEVICE)
    z = logits[-1].double().requires_grad_()
    targets = torch.full((rows,), vocabulary - 1, device=DEVICE)
    expected = functional.cross_entropy(z, targets[-1])
    expected.backward()
    losses = torch.empty(rows, device=DEVICE)
    cross_entropy_(logits, targets, losses, scale=1.0, ignored=IGNORED, gradient=True)
    torch.testing.assert_close(losses[-1].double(), expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(logits[-1].double(), z.grad, rtol=2**-8, atol=0)
    first = torch.full((), float(vocabulary), device=DEVICE).log()
    torch.testing.assert_close(losses[:-1], first.expand(rows - 1))
