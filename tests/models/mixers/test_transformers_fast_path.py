"""transformers' fused training functions: kept where they are right, with the projector called."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import (
    ProdialConfig,
    ProdialLinear,
    apply_prodial,
    merge_prodial,
    remove_prodial,
)
from prodial_kernels.models.adapt import inject
from prodial_kernels.models.mixers.hf import FUSED_SSD
from support.mixers import cuda_stand_ins
from support.mixers.adapted_families import (
    adapt,
    assert_alive_and_equal,
    forbid_reading_the_weight,
    fused_mixers,
    install_mamba_ssm,
    install_stand_in,
    oracle_step,
)
from support.models import FAMILIES, FUSED_FAMILIES, Step, build, decoded, token_ids, training_step

SSD_FAMILIES = [name for name, family in FAMILIES.items() if family.fused == FUSED_SSD]


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_functions_are_where_they_are_expected(name: str) -> None:
    mixers = fused_mixers(build(name))
    assert bool(mixers) == (FAMILIES[name].fused is not None)
    for mixer in mixers:
        source = inspect.getsource(inspect.unwrap(type(mixer).forward))
        # What stands in for ``self`` answers for these, and for nothing that is used twice.
        assert source.count(".training") == 1
        assert source.count(f"{FAMILIES[name].fused}(") == 1
        assert source.count("self.out_proj.weight") == 1
        assert source.count("self.out_proj(") == 1


@pytest.mark.parametrize("name", SSD_FAMILIES)
def test_fast_path_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt(name)
    expected = oracle_step(name, model, token_ids())
    calls = install_stand_in(monkeypatch, name)
    mixers = fused_mixers(model)
    with monkeypatch.context() as patch:
        forbid_reading_the_weight(patch)
        step = training_step(model, token_ids())
        assert calls == [m.out_proj.in_features for m in mixers], "the function stops in time"
        evaluated = model.eval()(input_ids=token_ids(), use_cache=False).logits
    assert_alive_and_equal(step, expected)
    torch.testing.assert_close(step.logits, evaluated, rtol=1e-4, atol=1e-5)
    assert len(calls) == len(mixers)
    merged = merge_prodial(copy.deepcopy(model))
    torch.testing.assert_close(training_step(merged, token_ids()).logits, evaluated)
    assert len(calls) == 2 * len(mixers), "a merged model gets upstream's fast path back"
    training_step(remove_prodial(model), token_ids())
    assert len(calls) == 3 * len(mixers), "so does one whose adapters were removed"


@pytest.mark.parametrize("name", SSD_FAMILIES)
def test_the_projectors_input_is_not_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With mamba-ssm's function, whose rule makes it again; the values are the same."""
    model = adapt(name)
    expected = oracle_step(name, model, token_ids())
    calls = install_mamba_ssm(monkeypatch, name)
    mixers = fused_mixers(model)
    with monkeypatch.context() as patch:
        forbid_reading_the_weight(patch)
        # Were it called, autograd would keep its input.
        patch.setattr(mixers[0].out_proj, "forward", None)
        step = training_step(model, token_ids())
    assert_alive_and_equal(step, expected)
    assert len(calls) == len(mixers)
    evaluated = model.eval()(input_ids=token_ids(), use_cache=False).logits
    torch.testing.assert_close(step.logits, evaluated, rtol=1e-4, atol=1e-5)
    calls.clear()
    training_step(merge_prodial(model), token_ids())
    assert len(calls) == len(mixers)


def test_checkpointing_with_mamba_ssm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt("mamba2")
    expected = training_step(model, token_ids())
    calls = install_mamba_ssm(monkeypatch, "mamba2")
    start_checkpointing(model)
    assert_alive_and_equal(training_step(model, token_ids()), expected)
    assert len(calls) == 4


def test_cached_decoding_continues_what_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    install_stand_in(monkeypatch, "mamba2")
    model = adapt("mamba2")
    logits = training_step(model, token_ids()).logits
    torch.testing.assert_close(decoded(model, token_ids()), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({"mamba_rms_norm": True, "mamba_norm_before_gate": True}, False),
        ({"mamba_rms_norm": True, "mamba_norm_before_gate": False}, True),
        ({"mamba_rms_norm": False, "mamba_norm_before_gate": True}, True),
    ],
)
def test_falcon_h1_is_fused_where_both_paths_agree(
    options: dict[str, bool], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapt("falcon_h1", **options)
    expected = oracle_step("falcon_h1", model, token_ids(), **options)
    calls = install_stand_in(monkeypatch, "falcon_h1")
    assert_alive_and_equal(training_step(model, token_ids()), expected)
    assert len(calls) == (len(fused_mixers(model)) if fused else 0)


def left_padding() -> Tensor:
    """[2, 7]: two tokens of the first row are padding."""
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, :2] = 0
    return mask


def masked_step(model: nn.Module) -> Step:
    model.train().zero_grad(set_to_none=True)
    output = model(input_ids=token_ids(), attention_mask=left_padding(), labels=token_ids())
    output.loss.backward()
    return Step(output.logits.detach(), {n: p.grad for n, p in model.named_parameters()})


MAMBA_TARGETS = [("in_proj", "out_proj"), ("in_proj",), ("in_proj", "x_proj", "dt_proj")]


@pytest.mark.parametrize("targets", MAMBA_TARGETS, ids=str)
def test_mamba_runs_our_block(targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    # With Eq. 7, the diagonal of an unlucky draw has no gradient.
    config = ProdialConfig(r=3, lora_alpha=6, target_modules=targets, diagonal="free")
    model = adapt("mamba", config, time_step_rank=3)
    expected = oracle_step("mamba", model, token_ids(), time_step_rank=3)
    upstream = install_stand_in(monkeypatch, "mamba")
    cuda_stand_ins.install(monkeypatch)
    forbid_reading_the_weight(monkeypatch)
    assert_alive_and_equal(training_step(model, token_ids()), expected)
    assert cuda_stand_ins.calls["scan_fwd"] == cuda_stand_ins.calls["scan_bwd"] == 2
    assert len(upstream) == 0
    monkeypatch.undo()
    evaluated = model.eval()(input_ids=token_ids(), use_cache=False).logits
    torch.testing.assert_close(expected.logits, evaluated, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_padding_is_masked_as_upstream_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In front of ``in_proj``; behind the convolution only its unfused path masks again."""
    install_stand_in(monkeypatch, name)
    model = adapt(name)
    merged = merge_prodial(copy.deepcopy(model))
    expected = masked_step(merged).logits
    assert not torch.allclose(training_step(merged, token_ids()).logits, expected, atol=1e-3)
    cuda_stand_ins.install(monkeypatch)
    torch.testing.assert_close(masked_step(model).logits, expected, rtol=1e-4, atol=1e-5)
    assert cuda_stand_ins.calls["scan_fwd"] == (2 if name == "mamba" else 0)


@pytest.mark.parametrize(
    ("name", "options"),
    [("mamba", {}), ("mamba", {"hidden_act": "gelu"}), ("falcon_mamba", {})],
    ids=["mamba without kernels", "mamba with gelu", "falcon_mamba"],
)
def test_others_stay_off_the_fused_function(
    name: str, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = training_step(adapt(name, **options), token_ids())
    calls = install_stand_in(monkeypatch, name)
    cuda_stand_ins.calls.clear()
    if name == "falcon_mamba" or options:
        cuda_stand_ins.install(monkeypatch)
    model, plain = adapt(name, **options), build(name, **options)
    assert_alive_and_equal(training_step(model, token_ids()), expected)
    assert len(calls) == cuda_stand_ins.calls["scan_fwd"] == 0
    assert all(mixer.training for mixer in fused_mixers(model))
    training_step(plain, token_ids())
    assert len(calls) == len(fused_mixers(model)), "a model without adapters is left alone"


@pytest.mark.parametrize("name", FUSED_FAMILIES)
def test_code_that_reads_the_weight_trains_every_adapter(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = training_step(adapt(name), token_ids())
    monkeypatch.setattr(inject, "adapt_mixers", lambda model: [])
    calls = install_stand_in(monkeypatch, name)
    model = adapt(name)
    assert_alive_and_equal(training_step(model, token_ids()), expected)
    assert len(calls) == len(fused_mixers(model))


@pytest.mark.parametrize("name", FUSED_FAMILIES)
def test_a_dead_adapter_would_be_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the base weight in place of W', as other adapters do it, the checks above fail."""
    expected = training_step(adapt(name), token_ids())
    monkeypatch.setattr(inject, "adapt_mixers", lambda model: [])
    monkeypatch.setattr(ProdialLinear, "weight", property(lambda layer: layer.base_layer.weight))
    install_stand_in(monkeypatch, name)
    step = training_step(adapt(name), token_ids())
    with pytest.raises(AssertionError, match=r"out_proj\S* has no gradient|in_proj\S*: relative"):
        assert_alive_and_equal(step, expected)
    dead = [n for n, gradient in step.gradients.items() if gradient is None]
    assert len(dead) == 4 * len(fused_mixers(build(name)))
    assert all("out_proj" in path for path in dead)


@pytest.mark.parametrize("name", FAMILIES)
def test_dropout_trains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ProdialConfig(r=3, lora_dropout=0.5)
    torch.manual_seed(5)
    expected = training_step(adapt(name, config), token_ids())
    if FAMILIES[name].fused:
        install_stand_in(monkeypatch, name)
    model = adapt(name, config)
    step = training_step(model, token_ids())
    assert_alive_and_equal(step, expected)
    assert not torch.equal(training_step(model, token_ids()).logits, step.logits)


def first_layer_only(projector: str) -> ProdialConfig:
    return ProdialConfig(
        r=2, target_modules=rf".*layers\.0\.mixer\.{projector}", allow_partial=True
    )


@pytest.mark.parametrize("projector", ["in_proj", "out_proj"])
def test_partly_adapted_models(projector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt("mamba2", first_layer_only(projector))
    expected = oracle_step("mamba2", model, token_ids())
    calls = install_stand_in(monkeypatch, "mamba2")
    assert_alive_and_equal(training_step(model, token_ids()), expected)
    first, second = fused_mixers(model)
    assert calls == [
        first.out_proj.in_features if projector == "out_proj" else first.out_proj.out_features,
        second.out_proj.out_features,
    ]


def test_falcon_mamba_never_uses_the_fused_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its upstream gradient is wrong, also for an adapter in a layer below."""
    calls = install_stand_in(monkeypatch, "falcon_mamba")
    step = training_step(adapt("falcon_mamba", first_layer_only("in_proj")), token_ids())
    assert len(calls) == 0
    assert all(gradient.count_nonzero() for gradient in step.gradients.values())


class OneNorm(nn.Module):
    """A gated norm over all groups, as releases before 5.24 have it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        gated = x * nn.functional.silu(gate)
        return nn.functional.rms_norm(gated, gated.shape[-1:], self.weight, self.variance_epsilon)


@pytest.mark.parametrize(
    ("name", "groups"),
    [("mamba2", "n_groups"), ("bamba", "mamba_n_groups"), ("granitemoehybrid", "mamba_n_groups")],
)
def test_groups_that_are_normed_together_are_never_fused(
    name: str, groups: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mamba_ssm's fused function norms each; the stand-in refuses to be called with several."""
    install_stand_in(monkeypatch, name)
    model = build(name, **{groups: 2})
    for mixer in fused_mixers(model):
        mixer.norm = OneNorm(mixer.norm)
    first = ProdialConfig(
        r=2, target_modules=r".*layers\.0\.(mixer|mamba)\.in_proj", allow_partial=True
    )
    apply_prodial(model, first)
    trained = training_step(model, token_ids()).logits
    torch.testing.assert_close(model.eval()(token_ids(), use_cache=False).logits, trained)


def start_checkpointing(model: nn.Module) -> None:
    if hasattr(model, "activation_checkpointing_enable"):  # since transformers 5.2x
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_gradient_checkpointing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = training_step(adapt(name), token_ids())
    calls = install_stand_in(monkeypatch, name)
    model = adapt(name)
    start_checkpointing(model)
    assert_alive_and_equal(training_step(model, token_ids()), expected)
    assert len(calls) == (0 if name == "mamba" else 2 * len(fused_mixers(model)))
