"""Captured blocks against the same model without, with graphs that a CPU stands in for."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import adapter_disabled, capture
from prodial_kernels.captured import Captured, CaptureError, CaptureWarning
from prodial_kernels.captured.checkpointing import checkpoints_outside
from prodial_kernels.captured.model import capture_with
from prodial_kernels.models.layers.blocks import plain_forward
from support.captured.models import LAYERS, adapted
from support.captured.standin import StandIn
from support.models import FAMILIES, randomise_adapters, token_ids


def step(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    """One forward and backward; the loss."""
    loss = model(input_ids=ids, labels=ids, use_cache=False, **options).loss
    loss.backward()
    return loss.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert one
    for name, gradient in one.items():
        assert torch.equal(gradient, other[name]), name


def warmed(
    model: nn.Module, ids: Tensor | None = None, *, together: bool = True, **options: Any
) -> StandIn:
    """Capture, and take the steps after which replaying begins."""
    engine = StandIn()
    captured = capture_with(model, engine, together=together)
    model.captured = [captured]  # type: ignore[assignment]
    for _ in range(2):
        step(model, token_ids() if ids is None else ids, **options)
    model.zero_grad(set_to_none=True)
    assert engine.captures == 0
    return engine


def release(model: nn.Module) -> None:
    for captured in model.captured:
        captured.release()
    del model.captured


def compared(
    model: nn.Module, run: Callable[[nn.Module], Any], *, replays: int, exact: bool = True,
    **options: Any,
) -> None:  # fmt: skip
    """``run`` returns what must be equal, captured and not."""
    plain = copy.deepcopy(model)
    engine = warmed(model, **options)
    torch.manual_seed(5)
    found = run(model), gradients(model)
    torch.manual_seed(5)
    expected = run(plain), gradients(plain)
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    torch.testing.assert_close(found, expected, **tolerance)
    assert engine.forwards == engine.backwards == replays
    release(model)


# --- Equal results. -------------------------------------------------------------------------------


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


def checkpointing(model: nn.Module, reentrant: bool = False) -> nn.Module:
    if checkpoints_outside(model.backbone.layers[0]):
        pytest.skip("this transformers checkpoints around a block's forward")
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    return model


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


# --- What is launched as before. ------------------------------------------------------------------


def test_another_shape_is_captured_too_until_there_are_too_many() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    engine = StandIn()
    captured = capture_with(model, engine)
    for length in (5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7, 8):
        step(model, token_ids(length=length))
    assert engine.captures == 4
    assert "[2, 8]: 4 of 4" in str(captured)
    model.zero_grad()
    with pytest.warns(CaptureWarning, match=r"a batch of \[2, 9\] is launched as before: 4 kinds"):
        found = step(model, token_ids(length=9))
    step(model, token_ids(length=10))  # said once
    model.zero_grad()
    found = step(model, token_ids(length=9))
    assert torch.equal(found, step(plain, token_ids(length=9)))
    same(gradients(model), gradients(plain))


def test_only_the_shape_that_was_asked_for() -> None:
    model = adapted()
    engine = StandIn()
    with capture_with(model, engine, batch_size=2, seq_len=7):
        with pytest.warns(CaptureWarning, match=r"\[1, 7\] .* asked for batch_size=2"):
            step(model, token_ids(batch=1))
        for _ in range(3):
            step(model, token_ids())
            step(model, token_ids(batch=1))
    assert engine.captures == 1
    assert engine.forwards == LAYERS


def test_evaluation_and_generation_are_not_replayed() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    engine = warmed(model)
    step(model, token_ids())
    for run in (model, plain):
        run.eval()
    assert torch.equal(model(token_ids()).logits, plain(token_ids()).logits)
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(
        model.generate(token_ids(), **options), plain.generate(token_ids(), **options)
    )
    model.train()
    with torch.no_grad():
        model(token_ids())
    assert engine.forwards == LAYERS
    model.zero_grad()
    step(model, token_ids())
    assert engine.forwards == 2 * LAYERS


def test_two_forwards_before_a_backward() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    engine = warmed(model)
    with pytest.warns(CaptureWarning, match="an earlier one still waits for its backward"):
        losses = [model(token_ids(seed=s), labels=token_ids(seed=s)).loss for s in (3, 4)]
    sum(losses).backward()
    expected = [plain(token_ids(seed=s), labels=token_ids(seed=s)).loss for s in (3, 4)]
    sum(expected).backward()
    same(gradients(model), gradients(plain))
    assert engine.forwards == LAYERS
    del losses
    step(model, token_ids())
    assert engine.forwards == 2 * LAYERS


def test_a_forward_without_a_backward_is_no_obstacle_once_it_is_gone() -> None:
    model = adapted()
    engine = warmed(model)
    model(token_ids())
    step(model, token_ids())
    assert engine.forwards == 2 * LAYERS


def test_a_second_backward_is_refused() -> None:
    model = adapted()
    warmed(model)
    loss = model(token_ids(), labels=token_ids()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second backward through blocks 0 to 3 \(Mamba2Block"):
        loss.backward()


def test_a_backward_out_of_order_is_refused() -> None:
    model = adapted()
    warmed(model, together=False)
    output = model(token_ids(), labels=token_ids(), output_hidden_states=True)
    with pytest.raises(RuntimeError, match="before that through block 3"):
        output.hidden_states[1].sum().backward()


def test_a_gradient_of_a_gradient_is_refused() -> None:
    model = adapted()
    warmed(model)
    loss = model(token_ids(), labels=token_ids()).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.pow(2).sum() for g in found).backward()


def test_what_waits_for_the_device_is_left_out() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    engine = StandIn()

    def watched(function: Callable[[], Any]) -> Any:
        index = len(seen)
        seen.append(index)
        return function(), ["experts.py:7"] if index == 1 else []

    seen: list[int] = []
    engine.watched = watched  # type: ignore[method-assign]
    capture_with(model, engine)
    step(model, token_ids())
    step(model, token_ids())
    model.zero_grad()
    with pytest.warns(CaptureWarning, match=r"block 1, .* waits for the device in experts.py:7"):
        step(model, token_ids(seed=3))
    step(plain, token_ids(seed=3))
    same(gradients(model), gradients(plain))
    assert engine.forwards == engine.backwards == LAYERS - 1


def test_changing_what_runs_between_blocks() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    engine = warmed(model, together=False)
    step(model, token_ids())
    for run in (model, plain):
        run.backbone.layers[1].register_forward_hook(lambda module, args, output: output * 2)
        run.zero_grad()
    with pytest.warns(CaptureWarning, match="block 2, .* is not what the block before returned"):
        step(model, token_ids(seed=3))
    step(plain, token_ids(seed=3))
    same(gradients(model), gradients(plain))
    assert engine.forwards == LAYERS + 2


# --- Blocks that share a graph. -------------------------------------------------------------------


def both(model: nn.Module) -> tuple[nn.Module, StandIn]:
    """What a model is compared with; it is replayed as one graph by now, and nothing was read."""
    plain = copy.deepcopy(model)
    engine = warmed(model)
    step(model, token_ids())
    model.zero_grad()
    assert [section.blocks for section in engine.captured] == [LAYERS]
    return plain, engine


def then_on_its_own(model: nn.Module, plain: nn.Module, engine: StandIn, **options: Any) -> None:
    """From the next step but two on, each block is replayed on its own."""
    before = engine.forwards
    for seed in (3, 4, 5):
        model.zero_grad()
        step(model, token_ids(seed=seed), **options)
    assert [section.blocks for section in engine.captured] == [1] * LAYERS
    assert engine.forwards == before + LAYERS
    plain.zero_grad()
    step(plain, token_ids(seed=5), **options)
    same(gradients(model), gradients(plain))


def test_hidden_states_that_are_kept_separate_the_blocks() -> None:
    model = adapted()
    plain, engine = both(model)
    results = []
    for run in (model, plain):
        options = {"labels": token_ids(), "output_hidden_states": True}
        if run is model:
            with pytest.warns(CaptureWarning, match="block 2, .* is kept: from now on each block"):
                output = run(token_ids(), **options)
        else:
            output = run(token_ids(), **options)
        (output.loss + output.hidden_states[1].pow(2).mean()).backward()
        results.append(output.hidden_states)
        del output
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
    same(gradients(model), gradients(plain))
    del results, found, expected
    then_on_its_own(model, plain, engine)


def test_a_result_that_is_read_separates_the_blocks() -> None:
    class Mean(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad(), torch.autocast("cpu"):
                seen.append(float(args[0].mean()))
            return self.block(*args, **kwargs)

    model = adapted(dropout=0.3)
    plain, engine = both(model)
    seen: list[float] = []
    for run in (model, plain):
        layers = run.backbone.layers
        reading = Mean()
        reading.block = layers[2]
        layers[2] = reading
        reading.train()
        torch.manual_seed(4)
        if run is model:
            with pytest.warns(CaptureWarning, match="is read before the next one: from now on"):
                found = step(run, token_ids(seed=3))
        else:
            assert torch.equal(found, step(run, token_ids(seed=3)))
    assert seen[0] == seen[1]
    assert engine.forwards == LAYERS
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_that_come_later_separate_the_blocks(kind: str) -> None:
    model = adapted()
    plain, engine = both(model)
    seen: list[Any] = []
    for run in (model, plain):
        register = getattr(run.backbone.layers[2], f"register_{kind}_hook")
        register(lambda *args: seen.append(1) or None)
    with pytest.warns(CaptureWarning, match="hooks by now: from now on each block"):
        step(model, token_ids(seed=3))
    step(plain, token_ids(seed=3))
    same(gradients(model), gradients(plain))
    assert len(seen) == 2
    with warnings.catch_warnings():
        if kind == "full_backward":
            warnings.simplefilter("ignore", CaptureWarning)
            return
        then_on_its_own(model, plain, engine)


def test_a_hook_between_blocks_divides_them() -> None:
    model = adapted()
    model.backbone.layers[1].register_forward_hook(lambda *_: None)
    engine = warmed(model)
    step(model, token_ids())
    assert [section.blocks for section in engine.captured] == [1, 1, 2]
    assert engine.forwards == engine.backwards == LAYERS


def test_a_block_given_other_tensors_than_the_one_before_runs_as_it_is() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
            return torch.tanh(self.linear(hidden)) * mask

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(4))

        def forward(self, hidden: Tensor, masks: list[Tensor]) -> Tensor:
            for layer, mask in zip(self.layers, masks, strict=True):
                hidden = layer(hidden, mask)
            return hidden.pow(2).sum()

    model = Model()
    plain = copy.deepcopy(model)
    engine = StandIn()
    with capture_with(model, engine):
        for _ in range(4):
            x, first = torch.randn(2, 3, 4), torch.rand(2, 3, 4)
            masks = [first] * 4
            for run in (model, plain):
                run.zero_grad()
                run(x, masks).backward()
            same(gradients(model), gradients(plain))
        assert engine.forwards == 8
        masks = [first, first, torch.rand(2, 3, 4), first]
        with pytest.warns(CaptureWarning, match="another tensor than the block before"):
            model(x, masks).backward()
        plain(x, masks).backward()
        same(gradients(model), gradients(plain))


def test_hooks_of_blocks_run_around_the_graphs() -> None:
    model = adapted()
    warmed(model)
    seen = []
    block = model.backbone.layers[2]
    block.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    block.register_full_backward_hook(lambda module, given, found: seen.append(found[0].clone()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        step(model, token_ids())
    assert len(seen) == 2
    assert not any(tensor.isnan().any() for tensor in seen)


def test_a_cache_in_training_is_said() -> None:
    model = adapted()
    capture_with(model, StandIn())
    with pytest.warns(CaptureWarning, match="'cache.*' is or holds a DynamicCache"):
        model(token_ids(), use_cache=True)


def test_saved_tensor_hooks_are_said() -> None:
    model = adapted()
    engine = warmed(model)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        pytest.warns(CaptureWarning, match="hooks of saved tensors"),
    ):
        step(model, token_ids())
    assert engine.forwards == 0


def test_offloaded_activations_are_left_to_transformers() -> None:
    model = checkpointing(adapted())
    engine = StandIn()
    for block in model.backbone.layers[:2]:
        block._gradient_checkpointing_func = lambda function, *args: function(*args)
    capture_with(model, engine)
    step(model, token_ids())
    step(model, token_ids())
    with pytest.warns(
        CaptureWarning, match="block 0, .* and 1 more .* checkpoints by a function of its own"
    ):
        step(model, token_ids())
    assert engine.forwards == LAYERS - 2


# --- Changes of the model. ------------------------------------------------------------------------


def test_a_changed_model_is_captured_again() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    engine = warmed(model)
    step(model, token_ids())
    for run in (model, plain):
        run.zero_grad()
        run.backbone.layers[1].mixer.in_proj.prodial_scale.requires_grad_(False)
    with pytest.warns(CaptureWarning, match="block 1, .* requires_grad of a tensor was changed"):
        step(model, token_ids(seed=3))
    step(plain, token_ids(seed=3))
    same(gradients(model), gradients(plain))
    with pytest.warns(CaptureWarning, match="captured again"):
        step(model, token_ids())
    for _ in range(2):
        model.zero_grad()
        step(model, token_ids(seed=3))
    assert engine.captures == 2
    step(plain, token_ids(seed=3))
    same(gradients(model), gradients(plain))


def test_switched_off_adapters_are_off() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    warmed(model)
    step(model, token_ids())
    model.get_input_embeddings().requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        with adapter_disabled(model), adapter_disabled(plain):
            found = model(token_ids(seed=3)).logits
            assert torch.equal(found, plain(token_ids(seed=3)).logits)


def test_values_may_change_in_place() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    engine = warmed(model)
    for run in (model, plain):
        randomise_adapters(run, seed=9)
        run.load_state_dict({k: v * 1.5 for k, v in run.state_dict().items()})
    assert torch.equal(step(model, token_ids()), step(plain, token_ids()))
    same(gradients(model), gradients(plain))
    assert engine.forwards == LAYERS


def test_state_dicts_copies_and_pickles() -> None:
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    warmed(model)
    captured = model.captured
    del model.captured
    step(model, token_ids())
    assert list(model.state_dict()) == list(before)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.zero_grad()
        for block in other.backbone.layers:
            assert block.forward.block is block
        expected = step(other, token_ids())
    model.zero_grad()
    assert torch.equal(step(model, token_ids()), expected)
    same(gradients(model), gradients(other))
    captured[0].release()
    captured[0].release()
    assert not any("forward" in vars(block) for block in model.backbone.layers)


def test_release_gives_a_forward_of_the_blocks_own_back() -> None:
    model = adapted()
    block = model.backbone.layers[1]
    own = block.forward
    calls = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    block.forward = forward
    engine = StandIn()
    with capture_with(model, engine) as captured:
        assert "none of 4 yet" in str(captured)
        for _ in range(3):
            step(model, token_ids())
        assert engine.forwards == LAYERS
    assert block.forward is forward
    assert len(calls) == 4  # twice as it was, once captured, once again for want of a graph
    assert engine.released == 1


def test_a_backward_after_release_still_works() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    warmed(model)
    loss = model(token_ids(), labels=token_ids()).loss
    release(model)
    loss.backward()
    step(plain, token_ids())
    same(gradients(model), gradients(plain))


# --- Refusals. ------------------------------------------------------------------------------------


def test_refusals() -> None:
    model = adapted()
    with pytest.raises(CaptureError, match="expected one on a CUDA device, got one on 'cpu'"):
        capture(model)
    with pytest.raises(CaptureError, match="batch_size must be at least 1, got 0"):
        capture_with(model, StandIn(), batch_size=0)
    with pytest.raises(CaptureError, match=r"no nn\.ModuleList of blocks to capture"):
        capture_with(nn.Linear(2, 2), StandIn())
    with capture_with(model, StandIn()), pytest.raises(CaptureError, match="captured already"):
        capture_with(model, StandIn())
    with pytest.raises(CaptureError, match="on 'meta'"):
        capture_with(copy.deepcopy(model).to("meta"), StandIn())
    model.backbone.layers[0]._hf_hook = object()
    with pytest.raises(CaptureError, match="accelerate moves"):
        capture_with(model, StandIn())


def test_more_than_one_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(CaptureError, match="in one process only so far, and this is one of 2"):
        capture_with(adapted(), StandIn())


def test_a_failed_capture_says_so_and_leaves_the_model_as_it_was() -> None:
    class Failing(StandIn):
        def capture(self, sections: Any, kept: int = 0) -> Any:
            raise RuntimeError("operation not permitted\nmore")

    model = adapted()
    captured = capture_with(model, Failing())
    step(model, token_ids())
    step(model, token_ids())
    with pytest.raises(CaptureError, match=r"graphs: operation not permitted\. Train without"):
        step(model, token_ids())
    captured.release()
    step(model, token_ids())


def test_the_handle_is_a_captured() -> None:
    with capture_with(adapted(), StandIn()) as captured:
        assert isinstance(captured, Captured)
