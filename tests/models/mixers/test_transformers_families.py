"""Every Mamba family of transformers, adapted: values, gradients, merging, removing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from prodial_kernels import ProdialConfig, apply_prodial, merge_prodial, remove_prodial
from support.mixers.adapted_families import (
    CONFIG,
    adapt,
    assert_alive_and_equal,
    count_projectors,
    forbid_reading_the_weight,
    oracle_step,
)
from support.models import FAMILIES, Step, build, randomise_adapters, token_ids, training_step


@pytest.mark.parametrize("name", FAMILIES)
def test_training_step_equals_parametrized_linears(name: str) -> None:
    model = adapt(name)
    step = training_step(model, token_ids())
    assert count_projectors(model) >= 4
    assert len(step.gradients) == 4 * count_projectors(model)
    assert_alive_and_equal(step, oracle_step(name, model, token_ids()))


@pytest.mark.parametrize("name", FAMILIES)
def test_merge_and_generate(name: str) -> None:
    model = adapt(name).eval()
    arguments = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
    logits = model(input_ids=token_ids()).logits
    tokens = model.generate(token_ids(), **arguments)
    plain = model(input_ids=tokens, use_cache=False).logits

    assert merge_prodial(model) is model
    assert count_projectors(model) == 0
    torch.testing.assert_close(model(input_ids=token_ids()).logits, logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.generate(token_ids(), **arguments), tokens)
    # With a cache or without one, greedy choice is the same.
    assert torch.equal(plain[:, 6:10].argmax(-1), tokens[:, 7:])
    original = build(name).eval()
    assert not torch.allclose(original(input_ids=token_ids()).logits, logits, atol=1e-3)
    assert original.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_remove_gives_the_model_back(name: str) -> None:
    model = build(name)
    modules = dict(model.named_modules())
    classes = {path: type(module) for path, module in modules.items()}
    logits = model(input_ids=token_ids(), use_cache=False).logits
    apply_prodial(model, CONFIG)
    randomise_adapters(model)
    training_step(model, token_ids())
    assert remove_prodial(model) is model
    assert dict(model.named_modules()) == modules
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in modules.values()
    )
    assert torch.equal(model(input_ids=token_ids(), use_cache=False).logits, logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_effective_weight_is_never_formed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt(name)
    forbid_reading_the_weight(monkeypatch)
    training_step(model, token_ids())
    model.eval().generate(token_ids(), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_repeatable_on_a_cpu(name: str) -> None:
    """Bit for bit; on a GPU those of Mamba-1 are not."""
    model = adapt(name)
    first, second = (training_step(model, token_ids()) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    for key, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[key]), key


def test_recognises_mixers_without_importing_transformers() -> None:
    code = (
        "import sys, torch, prodial_kernels as p; net = torch.nn.Sequential(torch.nn.Linear(2, 2));"
        "p.apply_prodial(net, p.ProdialConfig(target_modules=('0',)));"
        "print([m for m in ('transformers', 'triton', 'peft', 'mamba_ssm') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


def test_compiles_without_graph_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt("mamba2", num_hidden_layers=1)
    expected = training_step(model, token_ids())
    forbid_reading_the_weight(monkeypatch)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    step = training_step(compiled, token_ids())
    renamed = {n.removeprefix("_orig_mod."): g for n, g in step.gradients.items()}
    assert_alive_and_equal(Step(step.logits, renamed), expected)


def test_tied_output_embedding_can_be_adapted_and_stored(tmp_path: object) -> None:
    model = build("mamba")
    assert model.lm_head.weight is model.backbone.embeddings.weight
    embeddings = model.backbone.embeddings.weight.clone()
    apply_prodial(model, ProdialConfig(r=2, target_modules=("lm_head",)))
    randomise_adapters(model)
    logits = model.eval()(input_ids=token_ids()).logits
    merge_prodial(model)
    assert torch.equal(model.backbone.embeddings.weight, embeddings)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=token_ids()).logits, logits, rtol=1e-4, atol=1e-5)
