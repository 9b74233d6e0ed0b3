"""A model's head taken out of it: what it is, and what cannot be taken out and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.models.layers.head import HeadError, OutputHead, find_head, head_obstacle
from prodial_kernels.training.step.loss import LossError, choose_loss, make_loss
from support.loss_cases import HeadOnly, Output
from support.models import FAMILIES, build, token_ids


def test_head_of_any_dtype_scales_as_the_model_does() -> None:
    model = build("granitemoehybrid", logits_scaling=6.0).bfloat16()
    head = find_head(model)
    assert isinstance(head, OutputHead)
    assert head.scale == pytest.approx(1 / 6, rel=1e-6)


def test_a_failed_forward_leaves_the_head_as_it_was() -> None:
    model = build("mamba2")
    head = find_head(model)
    with pytest.raises((IndexError, RuntimeError)):
        head.hidden(torch.full((1, 4), 10**6))
    assert "forward" not in vars(model.lm_head)
    assert model(input_ids=token_ids()).logits.shape[-1] == 48


class _Capped(HeadOnly):
    def forward(self, input_ids: Tensor) -> Output:
        return Output(30 * torch.tanh(super().forward(input_ids).logits / 30))


def _capped() -> nn.Module:
    return _Capped(torch.randn(2, 9, 8), torch.randn(50, 8), None, 1.0)


def _headless() -> nn.Module:
    model = HeadOnly(torch.randn(2, 9, 8), torch.randn(50, 8), None, 1.0)
    model.head = model.lm_head
    del model.lm_head
    return model


def _adapted() -> nn.Module:
    model = build("mamba2", tie_word_embeddings=False)
    apply_prodial(model, ProdialConfig(r=2, target_modules=("in_proj", "out_proj", "lm_head")))
    return model


def _hooked() -> nn.Module:
    model = build("mamba2")
    model.lm_head.register_forward_hook(lambda module, inputs, output: output)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_capped, r"by more than a factor \(0 -> 0, 1 -> 0\.9996, .*soft cap"),
        (_headless, "names no head"),
        (_adapted, "is a ProdialLinear"),
        (_hooked, "has hooks"),
    ],
)
def test_a_head_that_cannot_be_taken_out(make: Any, reason: str) -> None:
    model = make()
    with pytest.raises(HeadError, match=reason):
        find_head(model)
    obstacle = head_obstacle(model)
    name, why = choose_loss("auto", torch.device("cpu"), head_obstacle=obstacle)
    assert name == "full"
    assert f"whole in memory: {obstacle}" in why
    with pytest.raises(LossError, match=r"'chunked' cannot be used.*use loss 'full'"):
        choose_loss("chunked", torch.device("cpu"), head_obstacle=obstacle)
    with pytest.raises(LossError, match=r"'chunked' cannot be used.*use loss 'full'"):
        make_loss(model, "chunked")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_does_to_its_logits_is_told_without_weights(family: str) -> None:
    model = build(family).to("meta")
    assert head_obstacle(model) is None
    plain: Any = type(model)

    class Capped(plain):
        def forward(self, *args: Any, **options: Any) -> Any:
            output = super().forward(*args, **options)
            output.logits = 30 * torch.tanh(output.logits / 30)
            return output

    model.__class__ = Capped
    assert "changes its logits by more than a factor" in str(head_obstacle(model))


@pytest.mark.parametrize("make", [_headless, _adapted, _hooked])
def test_a_head_that_cannot_be_taken_out_is_told_without_weights(make: Any) -> None:
    model = make()
    expected = head_obstacle(model)
    assert expected is not None
    assert head_obstacle(model.to("meta")) == expected


def test_what_only_weights_can_tell_is_no_obstacle_yet() -> None:
    """It has no base model that could be left out."""
    assert head_obstacle(_capped().to("meta")) is None
