"""The loss without whole logits against the whole one: values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prodial_kernels import ProdialConfig, apply_prodial, quantize_model
from prodial_kernels.models.layers.head import find_head
from prodial_kernels.testing import assert_all_accurate
from prodial_kernels.training.data.batches import IGNORED
from prodial_kernels.training.step import chunked_loss as chunked
from prodial_kernels.training.step.chunked_loss import chunked_cross_entropy
from prodial_kernels.training.step.loss import (
    ChunkedLoss,
    FullLoss,
    make_loss,
    negative_log_likelihoods,
)
from support.loss_cases import HeadOnly, Output, Static, half_dtype, labels_of, run
from support.models import FAMILIES, build, randomise_adapters, token_ids

# Families that multiply or divide their logits, and by what.
SCALED = {
    "granitemoehybrid": ({"logits_scaling": 6.0}, 1 / 6),
    "falcon_h1": ({"lm_head_multiplier": 0.3}, 0.3),
}


@pytest.mark.parametrize("kind", [ChunkedLoss, Static])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "half"])
@pytest.mark.parametrize(
    ("vocabulary", "bias", "scale"),
    [(5, True, 0.37), (296, False, 1.0), (303, False, 1.0), (303, True, 0.37)],
)
def test_loss_and_gradients_keep_the_accuracy_rule(
    vocabulary: int, kind: type[ChunkedLoss], half: bool, bias: bool, scale: float, by_kernel: bool
) -> None:
    width = 24
    dtype = half_dtype(by_kernel) if half else torch.float32
    parts = (torch.randn(2, 10, width), torch.randn(vocabulary, width) * 0.5)
    shift = torch.randn(vocabulary) if bias else None
    labels = labels_of(2, 10, vocabulary)

    def model(to: torch.dtype) -> HeadOnly:
        rounded = [None if t is None else t.to(dtype).to(to) for t in (*parts, shift)]
        return HeadOnly(*rounded, scale)  # type: ignore[arg-type]

    exact_model, eager_model = model(torch.float64), model(dtype)
    exact = run(FullLoss(exact_model), exact_model, labels)
    eager = run(FullLoss(eager_model), eager_model, labels)
    # Chunks that do not divide the number of tokens.
    result = run(kind(find_head(eager_model), rows=7), eager_model, labels)
    assert_all_accurate(result, eager, exact, dtype)


def test_a_frozen_head_gets_no_gradient_and_a_weight_may_be_a_tensor() -> None:
    model = HeadOnly(torch.randn(2, 9, 8), torch.randn(50, 8), None, 1.0)
    labels = labels_of(2, 9, 50)
    expected = run(FullLoss(model), model, labels)["d_states"]
    model.lm_head.requires_grad_(False)
    result = run(ChunkedLoss(find_head(model)), model, labels, torch.tensor(0.01))
    assert result.keys() == {"loss", "d_states"}
    torch.testing.assert_close(result["d_states"], expected)


def test_autocast_multiplies_in_its_dtype() -> None:
    model = HeadOnly(torch.randn(2, 9, 8), torch.randn(50, 8), None, 1.0)
    labels = labels_of(2, 9, 50)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(FullLoss(model), model, labels)
        result = run(ChunkedLoss(find_head(model)), model, labels)
    assert {t.dtype for t in result.values()} == {torch.float32}
    for name, value in result.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-2, atol=2e-4)
    # Not what fp32 gives.
    exact = run(FullLoss(model), model, labels)
    assert not torch.equal(result["d_states"], exact["d_states"])


@pytest.mark.parametrize("kind", [ChunkedLoss, Static])
def test_no_label_is_no_loss(kind: type[ChunkedLoss], by_kernel: bool) -> None:
    model = HeadOnly(torch.randn(2, 9, 8), torch.randn(50, 8), None, 1.0)
    labels = torch.full((2, 9), IGNORED)
    result = run(kind(find_head(model)), model, labels)
    assert float(result["loss"]) == 0
    assert not result["d_states"].any()


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_weight_is_not_rounded_and_may_be_tiny(as_tensor: bool, by_kernel: bool) -> None:
    """Hidden states of 16 bits get their gradient times weight and loss scale, rounded once."""
    dtype = half_dtype(by_kernel)
    states, matrix = torch.randn(1, 40, 16).to(dtype), torch.randn(103, 16).to(dtype)
    model = HeadOnly(states, matrix, None, 1.0)
    model.lm_head.requires_grad_(False)
    labels = torch.randint(0, 103, (1, 40))
    tiny = 1 / 30_000_000
    found = []
    for weight, loss_scale in ((1.0, 1.0), (torch.tensor(tiny) if as_tensor else tiny, 2.0**20)):
        loss = Static(find_head(model), rows=16)(labels, labels, weight)
        for _ in range(2):  # The second has what the first had to start from.
            model.zero_grad()
            (loss * loss_scale).backward(retain_graph=True)
        found.append(model.states.grad)
    product = found[0].float() * (torch.tensor(tiny) * 2.0**20)
    assert torch.equal(found[1], product.to(dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_transformers(family: str) -> None:
    overrides, scale = SCALED.get(family, ({}, 1.0))
    model = build(family, **overrides)
    apply_prodial(model, ProdialConfig(r=2))
    randomise_adapters(model)
    ids = token_ids()
    labels = ids.clone()
    labels[0, :3] = IGNORED

    def step(loss: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad(set_to_none=True)
        value = loss(ids, labels, 0.1)
        value.backward()
        return value, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    head = find_head(model)
    assert head.scale == pytest.approx(scale, rel=1e-6)
    assert model.training
    expected, gradients = step(FullLoss(model))
    value, found = step(ChunkedLoss(head, rows=3))
    torch.testing.assert_close(value, expected)
    assert found.keys() == gradients.keys() != set()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-3, atol=1e-5)


def test_a_model_of_mamba_ssm_is_not_given_use_cache() -> None:
    class Backbone(nn.Module):
        def forward(self, input_ids: Tensor, inference_params: Any = None) -> Tensor:
            return functional.one_hot(input_ids, 8).float()

    class MambaLMHeadModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Backbone()
            self.lm_head = nn.Linear(8, 8, bias=False)

        def forward(
            self, input_ids: Tensor, position_ids: Any = None, inference_params: Any = None,
            num_last_tokens: int = 0, **mixer_kwargs: Any,
        ) -> Output:  # fmt: skip
            return Output(self.lm_head(self.backbone(input_ids, inference_params, **mixer_kwargs)))

    model = MambaLMHeadModel()
    ids = torch.randint(0, 8, (2, 6))
    loss = make_loss(model, "chunked")
    assert loss.name == "chunked"
    torch.testing.assert_close(loss(ids, ids), FullLoss(model)(ids, ids))


def test_a_quantised_head() -> None:
    model = build("mamba2", hidden_size=64, num_heads=16, tie_word_embeddings=False)
    quantize_model(model, "int8", target_modules=["lm_head"])
    ids = token_ids()
    torch.testing.assert_close(ChunkedLoss(find_head(model))(ids, ids), FullLoss(model)(ids, ids))


def test_scores_are_those_of_the_whole_logits(by_kernel: bool) -> None:
    model = build("mamba2")
    head = find_head(model)
    ids = token_ids(1, 12)
    hidden = head.hidden(ids)[0, :-1]
    expected = functional.cross_entropy(
        model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none"
    )
    torch.testing.assert_close(negative_log_likelihoods(head, hidden, ids[0, 1:]), expected)


@pytest.mark.parametrize("vocabulary", [5, 264, 303, 320])
def test_no_product_is_given_memory_that_nobody_wrote(
    vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU with AMX, products in bf16 read rows to their ends, whatever their length."""
    buffers: list[Tensor] = []
    make = chunked.logits_buffer

    def kept(*arguments: Any) -> Tensor:
        buffers.append(make(*arguments))
        return buffers[-1]

    monkeypatch.setattr(chunked, "logits_buffer", kept)
    hidden = torch.randn(96, 64).bfloat16().requires_grad_()
    matrix = (0.05 * torch.randn(vocabulary, 64)).bfloat16().requires_grad_()
    targets = torch.randint(0, vocabulary, (96,))
    chunked_cross_entropy(
        hidden, matrix, None, targets, None, weight=1.0, scale=1.0, rows=64
    ).backward()
    chunked.chunked_losses(hidden, matrix, None, targets, scale=1.0, rows=64)
    assert hidden.grad.isfinite().all()
    assert matrix.grad.isfinite().all()
    assert len(buffers) == 2
    for buffer in buffers:
        assert buffer.isfinite().all()
