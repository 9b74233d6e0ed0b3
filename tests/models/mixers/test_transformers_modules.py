"""Adapted mixers of transformers as modules: copies, replicas, threads, errors, torch.compile."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import ProdialLinear, remove_prodial
from support.mixers.adapted_families import (
    adapt,
    assert_alive_and_equal,
    count_projectors,
    fused_mixers,
    install_stand_in,
)
from support.models import Step, token_ids, training_step


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_independent(
    duplicate: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = install_stand_in(monkeypatch, "mamba2")
    model = adapt("mamba2")
    expected = training_step(model, token_ids())
    twin = duplicate(model)
    assert_alive_and_equal(training_step(twin, token_ids()), expected)
    remove_prodial(twin)
    calls.clear()
    assert_alive_and_equal(training_step(model, token_ids()), expected)
    assert calls == [32, 32], "still without the projection"
    calls.clear()
    training_step(twin, token_ids())
    assert calls == [16, 16], "the copy's are as upstream's"
    assert count_projectors(model) == 4


def test_a_replica_runs_on_its_own_parameters() -> None:
    """``nn.DataParallel`` copies a module's attributes and then puts other tensors into them."""
    mixer = fused_mixers(adapt("mamba2"))[0]
    x = torch.randn(2, 7, 16)
    expected = mixer(x)
    replica = mixer._replicate_for_data_parallel()
    vars(replica).update(mixer.named_parameters(recurse=False))
    replica.out_proj = copy.deepcopy(mixer.out_proj)
    replica.out_proj.enable_adapter(False)
    assert not torch.allclose(replica(x), expected)
    assert torch.equal(mixer(x), expected)
    assert type(replica).__name__ == type(mixer).__name__ == "Mamba2Mixer"


def test_threads_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread trains while another evaluates; each is inside a mixer when the other is."""
    install_stand_in(monkeypatch, "mamba2")
    model, other = adapt("mamba2"), adapt("mamba2").eval()
    other.backbone.layers[0].mixer.out_proj = model.backbone.layers[0].mixer.out_proj
    expected = training_step(model, token_ids()).logits
    barrier = threading.Barrier(2, timeout=60)
    original = ProdialLinear.forward

    def meet(layer: ProdialLinear, *args: object, **kwargs: object) -> Tensor:
        barrier.wait()
        return original(layer, *args, **kwargs)

    monkeypatch.setattr(ProdialLinear, "forward", meet)
    results: dict[str, Tensor] = {}

    def run(name: str, module: nn.Module) -> None:
        results[name] = module(input_ids=token_ids(), use_cache=False).logits

    threads = [threading.Thread(target=run, args=pair) for pair in (("a", model), ("b", other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(results["a"], expected)
    torch.testing.assert_close(results["b"], expected, rtol=1e-4, atol=1e-5)


def test_an_error_inside_leaves_the_model_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt("mamba2")
    expected = training_step(model, token_ids())

    def fail(layer: ProdialLinear, input: Tensor) -> Tensor:
        raise KeyError("inside the mixer")

    with monkeypatch.context() as patch:
        patch.setattr(ProdialLinear, "forward", fail)
        with pytest.raises(KeyError, match="inside the mixer"):
            training_step(model, token_ids())
    assert all(module.training for module in model.modules())
    assert_alive_and_equal(training_step(model, token_ids()), expected)


def test_fused_training_compiles_without_graph_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    install_stand_in(monkeypatch, "mamba2")
    model = adapt("mamba2", num_hidden_layers=1)
    expected = training_step(model, token_ids())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    step = training_step(compiled, token_ids())
    renamed = {n.removeprefix("_orig_mod."): g for n, g in step.gradients.items()}
    assert_alive_and_equal(Step(step.logits, renamed), expected)
