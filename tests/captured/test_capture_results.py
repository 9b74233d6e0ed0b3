"""Captured blocks against the same model without, with graphs that a CPU stands in for."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels.captured import CaptureWarning
from prodial_kernels.captured.model import capture_with
from prodial_kernels.models.layers.blocks import plain_forward
from support.captured.models import LAYERS, adapted
from support.captured.standin import StandIn
from support.captured.steps import checkpointing, compared, gradients, release, same, step, warmed
from support.models import FAMILIES, token_ids


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, together: bool) -> None:
    model = adapted(family)
    plain = copy.deepcopy(model)
    engine = warmed(model, together=together)
    for seed in (1, 7, 8):
        ids = token_ids(seed=seed)
        assert torch.equal(step(model, ids), step(plain, ids))
        same(gradients(model), gradients(plain))
    assert engine.captures == 1
    blocks = sum(section.blocks for section in engine.captured)
    assert blocks >= 2
    assert (len(engine.captured) < blocks) == together
    assert engine.forwards == engine.backwards == 3 * blocks
    release(model)


@pytest.mark.parametrize("together", [True, False])
def test_accumulated_gradients_do_not_share_memory_with_graphs(together: bool) -> None:
    def run(model: nn.Module) -> None:
        for seed in (3, 4, 5):
            step(model, token_ids(seed=seed))

    compared(adapted(), run, replays=3 * LAYERS, together=together)


def test_gradients_outlive_later_steps() -> None:
    model = adapted()
    warmed(model)
    step(model, token_ids(seed=3))
    first = gradients(model)
    copies = {name: gradient.clone() for name, gradient in first.items()}
    step(model, token_ids(seed=4))
    same(first, copies)


@pytest.mark.parametrize("together", [True, False])
def test_dropout_draws_what_it_would_have_drawn(together: bool) -> None:
    def run(model: nn.Module) -> list[Tensor]:
        return [step(model, token_ids(seed=seed)) for seed in (3, 4)] + [torch.rand(3)]

    compared(adapted(dropout=0.3), run, replays=2 * LAYERS, together=together)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_a_forward_is_left_to_it(reentrant: bool) -> None:
    """As in transformers 5.17."""
    model = adapted()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(nn.Module.__call__, self, **kwargs)
        return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=reentrant)

    own = type(model.backbone.layers[0])
    cls = type("Old", (own,), {"__call__": call})
    # Within, it is not checkpointed again.
    cls.forward = plain_forward(own.forward)
    for layer in model.backbone.layers:
        layer.__class__ = cls
        layer.gradient_checkpointing = True
    model.enable_input_require_grads()
    plain = copy.deepcopy(model)
    engine = StandIn()
    capture_with(model, engine)
    with pytest.warns(CaptureWarning, match="checkpoints around a block's forward"):
        step(model, token_ids())
    for _ in range(3):
        model.zero_grad()
        step(model, token_ids())
    step(plain, token_ids())
    same(gradients(model), gradients(plain))
    assert engine.captures == 0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(dropout: float, reentrant: bool) -> None:
    model = checkpointing(adapted(dropout=dropout), reentrant)
    model.enable_input_require_grads()
    plain = copy.deepcopy(model)
    engine = warmed(model)
    torch.manual_seed(5)
    found = step(model, token_ids(seed=3)), gradients(model)
    torch.manual_seed(5)
    expected = step(plain, token_ids(seed=3)), gradients(plain)
    assert torch.equal(found[0], expected[0])
    same(found[1], expected[1])
    assert engine.backwards == LAYERS
    assert all(section.checkpointed for section in engine.captured)
    assert all(section.draws == bool(dropout) for section in engine.captured)
    release(model)
    # The flag is transformers', and stays.
    assert all(block.gradient_checkpointing for block in model.backbone.layers)


def test_autocast_is_captured_as_it_is_set() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    engine = StandIn()
    with capture_with(model, engine), torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            model.zero_grad()
            found = step(model, token_ids())
        assert torch.equal(found, step(plain, token_ids()))
        same(gradients(model), gradients(plain))
        assert engine.forwards == LAYERS
    # Without autocast it is another kind of call.
    assert model.training


def test_masks_and_hidden_states_are_right_also_when_kept() -> None:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0

    def run(model: nn.Module) -> Any:
        output = model(
            input_ids=token_ids(seed=3), labels=token_ids(seed=3), use_cache=False,
            attention_mask=mask.clone(), output_hidden_states=True,
        )  # fmt: skip
        kept = output.hidden_states[2]
        kept.retain_grad()
        (output.loss + output.hidden_states[1].pow(2).mean()).backward()
        return [*(state.detach() for state in output.hidden_states), kept.grad]

    # Of what else a block's result is used for, the gradient is added in another order.
    options = {"attention_mask": mask.flip(0), "together": False}
    compared(adapted(), run, replays=LAYERS, exact=False, **options)


def test_other_parameters_train_beside_and_any_optimiser_works() -> None:
    model = adapted(tie_word_embeddings=False)
    model.get_input_embeddings().requires_grad_(True)
    plain = copy.deepcopy(model)
    engine = StandIn()
    capture_with(model, engine)
    for trained in (model, plain):
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-2)
        for seed in range(6):
            step(trained, token_ids(seed=seed))
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=seed % 2 == 0)
    assert engine.forwards == 4 * LAYERS
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_loop_over_blocks_of_pairs() -> None:
    """As mamba_ssm's blocks: hidden states and a residual, both in and out."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Any:
            residual = hidden if residual is None else hidden + residual
            return torch.tanh(self.linear(residual)), residual

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(4))

        def forward(self, hidden: Tensor) -> Tensor:
            residual = None
            for layer in self.layers:
                hidden, residual = layer(hidden, residual)
            return (hidden + residual).pow(2).sum()

    model = Model()
    plain = copy.deepcopy(model)
    engine = StandIn()
    with capture_with(model, engine):
        for seed in range(4):
            x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))
            model(x).backward()
            plain(x).backward()
            same(gradients(model), gradients(plain))
    assert engine.forwards == 8
