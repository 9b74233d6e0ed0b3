"""Every Mamba family of transformers, adapted: values, gradients, merging, the fused shortcut."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import stand_ins
import torch
from models import (
    FAMILIES,
    FUSED_FAMILIES,
    Step,
    build,
    randomise_adapters,
    token_ids,
    training_step,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prodial_kernels import (
    ProdialConfig,
    ProdialLinear,
    apply_prodial,
    merge_prodial,
    remove_prodial,
)
from prodial_kernels.mixers import inject
from prodial_kernels.mixers.transformers import calls_fused_function

CONFIG = ProdialConfig(r=3, lora_alpha=6, block_size={"in_proj": 4, "out_proj": 2})


class EffectiveWeight(nn.Module):
    """Eq. 7 written out densely, independent of the package: W -> s ⊙ (W D_b) + α B A."""

    def __init__(self, layer: ProdialLinear) -> None:
        super().__init__()
        for name, parameter in layer.adapter_parameters():
            setattr(self, name, nn.Parameter(parameter.detach().clone()))
        self.lora_scaling = layer.lora_alpha / layer.r

    def forward(self, weight: Tensor) -> Tensor:
        d_a = torch.block_diag(*self.prodial_blocks)
        identity = torch.eye(d_a.shape[0])
        d_b = (identity - torch.relu(identity * d_a)) + (1 - identity) * d_a
        low_rank = self.lora_scaling * (self.prodial_b @ self.prodial_a)
        return self.prodial_scale[:, None] * (weight @ d_b) + low_rank


def adapt(name: str, config: ProdialConfig = CONFIG) -> nn.Module:
    model = build(name)
    apply_prodial(model, config)
    randomise_adapters(model)
    return model


def oracle_step(name: str, adapted: nn.Module, ids: Tensor) -> Step:
    """The same step on plain nn.Linear layers, their weights computed by ``EffectiveWeight``."""
    model = build(name).requires_grad_(False)
    layers = {n: m for n, m in adapted.named_modules() if isinstance(m, ProdialLinear)}
    for path, layer in layers.items():
        parametrize.register_parametrization(
            model.get_submodule(path), "weight", EffectiveWeight(layer)
        )
    step = training_step(model, ids)
    renamed = {n.replace("parametrizations.weight.0.", ""): g for n, g in step.gradients.items()}
    return Step(step.logits, renamed)


def assert_alive_and_equal(step: Step, expected: Step) -> None:
    """Every adapter tensor has a finite non-zero gradient, and it is the expected one."""
    assert step.gradients.keys() == expected.gradients.keys()
    for name, gradient in step.gradients.items():
        assert gradient is not None, f"{name} has no gradient"
        assert torch.isfinite(gradient).all(), f"{name} has a non-finite gradient"
        assert gradient.count_nonzero() > 0, f"{name} has a zero gradient"
        reference = expected.gradients[name]
        error = (gradient - reference).norm() / reference.norm()
        assert error < 1e-4, f"{name}: relative gradient error {error:.1e}"
    torch.testing.assert_close(step.logits, expected.logits, rtol=1e-4, atol=1e-5)


def count_projectors(model: nn.Module) -> int:
    return sum(isinstance(module, ProdialLinear) for module in model.modules())


def fused_mixers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if calls_fused_function(module)]


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Tensor]]:
    """Put the stand-in into a family's modeling module; return the outputs it produces."""

    def install(name: str) -> list[Tensor]:
        family = FAMILIES[name]
        stand_in = getattr(stand_ins, family.fused)
        modeling = sys.modules[type(build(name)).__module__]
        outputs: list[Tensor] = []

        def recorded(*args: object, **kwargs: object) -> Tensor:
            outputs.append(stand_in(*args, **kwargs))
            return outputs[-1]

        assert hasattr(modeling, family.fused)
        monkeypatch.setattr(modeling, family.fused, recorded)
        return outputs

    return install


@pytest.fixture
def weight_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(layer: ProdialLinear) -> Tensor:
        raise AssertionError("ProdialLinear.weight was read")

    monkeypatch.setattr(ProdialLinear, "weight", property(read))


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
    logits = model(input_ids=token_ids(), use_cache=False).logits
    apply_prodial(model, CONFIG)
    randomise_adapters(model)
    training_step(model, token_ids())
    assert remove_prodial(model) is model
    assert dict(model.named_modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in modules.values()
    )
    assert torch.equal(model(input_ids=token_ids(), use_cache=False).logits, logits)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("weight_is_not_read")
def test_effective_weight_is_never_formed(name: str) -> None:
    model = adapt(name)
    training_step(model, token_ids())
    model.eval().generate(token_ids(), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_functions_are_where_they_are_expected(name: str) -> None:
    mixers = fused_mixers(build(name))
    assert bool(mixers) == (FAMILIES[name].fused is not None)
    for mixer in mixers:
        source = inspect.getsource(inspect.unwrap(type(mixer).forward))
        # The mixer's training flag may be changed only while it decides nothing else.
        assert source.count(".training") == 1
        assert source.count(f"{FAMILIES[name].fused}(") == 1


@pytest.mark.parametrize("name", FUSED_FAMILIES)
def test_adapted_mixers_stay_off_the_fused_function(
    name: str, fused_calls: Callable[[str], list[Tensor]]
) -> None:
    expected = training_step(adapt(name), token_ids())
    calls = fused_calls(name)
    model, plain = adapt(name), build(name)
    mixers = len(fused_mixers(model))
    assert_alive_and_equal(training_step(model, token_ids()), expected)
    assert len(calls) == 0
    assert all(mixer.training for mixer in fused_mixers(model))
    training_step(plain, token_ids())
    assert len(calls) == mixers, "a model without adapters keeps its fast path"
    training_step(merge_prodial(copy.deepcopy(model)), token_ids())
    assert len(calls) == 2 * mixers, "a merged model gets its fast path back"
    training_step(remove_prodial(model), token_ids())
    assert len(calls) == 3 * mixers, "so does one whose adapters were removed"


@pytest.mark.parametrize("name", FUSED_FAMILIES)
def test_code_that_reads_the_weight_trains_every_adapter(
    name: str, fused_calls: Callable[[str], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = training_step(adapt(name), token_ids())
    monkeypatch.setattr(inject, "bypass_fused_training", lambda model: [])
    calls = fused_calls(name)
    model = adapt(name)
    assert_alive_and_equal(training_step(model, token_ids()), expected)
    assert len(calls) == len(fused_mixers(model))


@pytest.mark.parametrize("name", FUSED_FAMILIES)
def test_a_dead_adapter_would_be_noticed(
    name: str, fused_calls: Callable[[str], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the base weight in place of W', as other adapters do it, the checks above fail."""
    expected = training_step(adapt(name), token_ids())
    monkeypatch.setattr(inject, "bypass_fused_training", lambda model: [])
    monkeypatch.setattr(ProdialLinear, "weight", property(lambda layer: layer.base_layer.weight))
    fused_calls(name)
    step = training_step(adapt(name), token_ids())
    with pytest.raises(AssertionError, match=r"out_proj\S* has no gradient|in_proj\S*: relative"):
        assert_alive_and_equal(step, expected)
    dead = [n for n, gradient in step.gradients.items() if gradient is None]
    assert len(dead) == 4 * len(fused_mixers(build(name)))
    assert all("out_proj" in path for path in dead)


@pytest.mark.parametrize("name", FAMILIES)
def test_dropout_trains(name: str, fused_calls: Callable[[str], list[Tensor]]) -> None:
    config = ProdialConfig(r=3, lora_dropout=0.5)
    torch.manual_seed(5)
    expected = training_step(adapt(name, config), token_ids())
    calls = fused_calls(name) if FAMILIES[name].fused else []
    model = adapt(name, config)
    step = training_step(model, token_ids())
    assert_alive_and_equal(step, expected)
    assert len(calls) == 0
    assert not torch.equal(training_step(model, token_ids()).logits, step.logits)


def test_recognises_mixers_without_importing_transformers() -> None:
    code = (
        "import sys, torch, prodial_kernels as p; net = torch.nn.Sequential(torch.nn.Linear(2, 2));"
        "p.apply_prodial(net, p.ProdialConfig(target_modules=('0',)));"
        "print([m for m in ('transformers', 'triton', 'peft', 'mamba_ssm') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


def first_layer_only() -> ProdialConfig:
    return ProdialConfig(r=2, target_modules=r".*layers\.0\.mixer\.in_proj", allow_partial=True)


def test_unadapted_mixers_keep_the_fast_path(fused_calls: Callable[[str], list[Tensor]]) -> None:
    calls = fused_calls("mamba")
    training_step(adapt("mamba", first_layer_only()), token_ids())
    assert len(calls) == 1


def test_falcon_mamba_never_uses_the_fused_function(
    fused_calls: Callable[[str], list[Tensor]],
) -> None:
    """Its upstream gradient is wrong, also for an adapter in a layer below."""
    calls = fused_calls("falcon_mamba")
    step = training_step(adapt("falcon_mamba", first_layer_only()), token_ids())
    assert len(calls) == 0
    assert all(gradient.count_nonzero() for gradient in step.gradients.values())


def test_training_resumes_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt("mamba")

    def fail(layer: ProdialLinear, input: Tensor) -> Tensor:
        raise KeyError("inside the mixer")

    with monkeypatch.context() as patch:
        patch.setattr(ProdialLinear, "forward", fail)
        with pytest.raises(KeyError, match="inside the mixer"):
            training_step(model, token_ids())
    assert all(module.training for module in model.modules())
    model.eval()(input_ids=token_ids())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_gradient_checkpointing(name: str, fused_calls: Callable[[str], list[Tensor]]) -> None:
    expected = training_step(adapt(name), token_ids())
    calls = fused_calls(name)
    model = adapt(name)
    if hasattr(model, "activation_checkpointing_enable"):  # since transformers 5.2x
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_alive_and_equal(training_step(model, token_ids()), expected)
    assert len(calls) == 0
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_independent(
    duplicate: Callable[[nn.Module], nn.Module], fused_calls: Callable[[str], list[Tensor]]
) -> None:
    calls = fused_calls("mamba2")
    model = adapt("mamba2")
    expected = training_step(model, token_ids())
    twin = duplicate(model)
    assert_alive_and_equal(training_step(twin, token_ids()), expected)
    remove_prodial(twin)
    assert_alive_and_equal(training_step(model, token_ids()), expected)
    assert len(calls) == 0, "the original's mixers are still kept off the fused function"
    training_step(twin, token_ids())
    assert len(calls) == 2, "the copy's mixers are not"
    assert count_projectors(model) == 4


@pytest.mark.usefixtures("weight_is_not_read")
def test_compiles_without_graph_breaks() -> None:
    model = adapt("mamba2")
    expected = training_step(model, token_ids())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    step = training_step(compiled, token_ids())
    renamed = {n.removeprefix("_orig_mod."): g for n, g in step.gradients.items()}
    assert_alive_and_equal(Step(step.logits, renamed), expected)
    assert all(module.training for module in model.modules())


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
