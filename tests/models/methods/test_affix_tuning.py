"""Affix-tuning: against its definition in fp64, in every mixer, in decoding, under padding."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import (
    AffixTuning,
    ProdialConfig,
    adapter_disabled,
    adapter_parameter_groups,
    apply_methods,
    load_adapter,
    merge_prodial,
    quantize_model,
    remove_prodial,
    save_adapter,
)
from prodial_kernels.models.layers.decoding import Reader, clamp_steps
from prodial_kernels.models.methods.affix_tuning import Affix
from prodial_kernels.models.mixers.inserted.lengths import costly_length
from prodial_kernels.models.mixers.inserted.tokens import PaddedLayout, layout
from prodial_kernels.models.vision_mamba.mixer import BidirectionalMamba
from support.mixers import cuda_stand_ins
from support.mixers.affix_oracle import affix_by_definition, own_tokens
from support.mixers.mamba_ssm_stand_ins import Mamba, Mamba2, Mamba2Simple, Model, inference_params
from support.mixers.vim_stand_in import Mamba as VimMamba
from support.models import FAMILIES, build

WIDTH, LENGTH, K = 6, 11, 3
FUSED = [name for name, family in FAMILIES.items() if family.fused is not None]


def ids(batch: int = 2) -> Tensor:
    return torch.arange(2, 13)[None].repeat(batch, 1)


def adapted(mixer: nn.Module, method: AffixTuning, dtype: torch.dtype) -> nn.Sequential:
    """A model of one mixer, its parameters away from special values."""
    torch.manual_seed(0)
    module = nn.Sequential(mixer)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    apply_methods(module.to(dtype), [method])
    return module


def compare(module: nn.Sequential, method: AffixTuning, directions: int, tolerance: float) -> None:
    """Output and the gradients of the input and of all that trains, against fp64."""
    exact = copy.deepcopy(module).double()
    x = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    given = [x.to(next(module.parameters()).dtype).requires_grad_(), x.double().requires_grad_()]
    outputs = [module(given[0])]
    tokens = own_tokens(exact, method.mlp)
    each = [tokens[0 if len(tokens) == 1 else d] for d in range(directions)]
    outputs.append(affix_by_definition(exact[0], given[1], each, method.position, directions))
    found = []
    for model, x, y in zip((module, exact), given, outputs, strict=True):
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        gradients = torch.autograd.grad((y * weights).sum(), [x, *trained.values()])
        found.append(dict(zip(["y", "x", *trained], [y.detach(), *gradients], strict=True)))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert value.count_nonzero(), f"{name} is 0"
        error = (value - found[1][name]).norm() / found[1][name].norm()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


METHODS = {
    "prefix": AffixTuning(K),
    "infix": AffixTuning(K, "infix"),
    "network": AffixTuning(K, mlp=True, hidden=5),
    "shared": AffixTuning(K, shared=True),
    "infix-shared": AffixTuning(2, "infix", shared=True),
    "suffix": AffixTuning(K, "suffix"),
}
CAUSAL = ["prefix", "infix", "network"]


@pytest.mark.parametrize("name", METHODS)
def test_both_directions_read_their_own_tokens(name: str) -> None:
    """In particular what a direction's tokens do is no output of the other direction's scan."""
    method = METHODS[name]
    module = adapted(BidirectionalMamba(WIDTH, d_state=4), method, torch.float64)
    compare(module, method, 2, 1e-10)


@pytest.mark.parametrize("name", ["prefix", "infix", "infix-shared", "suffix"])
def test_both_directions_on_the_scan_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_stand_ins.install(monkeypatch)
    method = METHODS[name]
    mixer = BidirectionalMamba(WIDTH, d_state=4, scan="cuda")
    compare(adapted(mixer, method, torch.float32), method, 2, 3e-6)
    assert cuda_stand_ins.calls["scan_bwd"] == 2


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_in_the_fused_block(name: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_stand_ins.install(monkeypatch)
    method = METHODS[name]
    module = adapted(Mamba(WIDTH, bias=True), method, torch.float32)
    module[0].prodial_recompute_xz = recompute
    compare(module, method, 1, 3e-6)
    assert cuda_stand_ins.calls == {"conv_fwd": 2, "scan_fwd": 1, "scan_bwd": 1, "conv_bwd": 1}


@pytest.mark.parametrize("name", CAUSAL)
def test_on_separate_kernels(name: str) -> None:
    method = METHODS[name]
    mixer = Mamba(WIDTH, bias=True, use_fast_path=False)
    compare(adapted(mixer, method, torch.float64), method, 1, 1e-5)


@pytest.mark.parametrize("kind", ["v2", "none"])
def test_in_mixers_of_vim(kind: str) -> None:
    method = METHODS["prefix"]
    module = adapted(VimMamba(WIDTH, bimamba_type=kind), method, torch.float64)
    compare(module, method, 2 if kind == "v2" else 1, 1e-5)


# --- Whole models. --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUSED)
def test_families_train_evaluate_and_decode_alike(name: str) -> None:
    model = build(name)
    apply_methods(model, [AffixTuning(K)])
    output = model(input_ids=ids(), labels=ids())
    output.loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.count_nonzero() for p in trained.values())
    model.eval()
    with torch.no_grad(), clamp_steps(model):
        whole = model(input_ids=ids(1), use_cache=False).logits[0]
        torch.testing.assert_close(whole, output.logits[0], rtol=1e-4, atol=1e-5)
        reader = Reader(model)
        steps = [reader.read(ids()[0, :5].tolist())]
        steps += [reader.read([int(token)]) for token in ids()[0, 5:]]
        assert reader.cached, reader.why
        torch.testing.assert_close(torch.stack(steps), whole[4:], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("stand_in_kernels")
def test_mamba_ssm_decodes_step_by_step() -> None:
    model = Model(Mamba)
    apply_methods(model, [AffixTuning(K)])
    with torch.no_grad():
        whole, cache = model(ids() % 11), inference_params()
        outputs = [model(ids()[:, :4] % 11, inference_params=cache)]
        for place in range(4, LENGTH):
            cache.seqlen_offset = place
            token = ids()[:, place : place + 1] % 11
            outputs.append(model(token, inference_params=cache))
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("stand_in_kernels")
def test_stored_projectors_read_tokens_alike() -> None:
    model = Model(Mamba, width=32)
    quantize_model(model, "nf4")
    apply_methods(model, [AffixTuning(K)])
    fused = model(ids() % 11)
    for layer in model.layers:
        layer.mixer.use_fast_path = False
    torch.testing.assert_close(model(ids() % 11), fused, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("stand_in_kernels")
@pytest.mark.parametrize("mixer", [Mamba2, Mamba2Simple])
@pytest.mark.parametrize("config", [[], [ProdialConfig(r=2)]], ids=["alone", "with ProDiaL"])
def test_mamba_2_of_mamba_ssm(mixer: Any, config: list[Any]) -> None:
    model = Model(mixer).double()
    apply_methods(model, [*config, AffixTuning(K)])
    fused = model(ids() % 11)
    fused.sum().backward()
    trained = [p for n, p in model.named_parameters() if "affix" in n]
    assert all(p.grad is not None and p.grad.count_nonzero() for p in trained)
    for layer in model.layers:
        layer.mixer.use_mem_eff_path = False
    torch.testing.assert_close(model(ids() % 11), fused)


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "mamba2"])
@pytest.mark.parametrize("fused", [False, True], ids=["separate", "block"])
def test_padding_on_either_side(name: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if fused:
        if name != "mamba":
            pytest.skip("only mamba has the block of its own")
        cuda_stand_ins.install(monkeypatch)
    model = build(name)
    apply_methods(model, [AffixTuning(K)])
    model.train(fused)
    text, other = ids(1), torch.full((1, LENGTH + 2), 7)
    for left in (True, False):
        padding = torch.zeros(1, 2, dtype=torch.long)
        parts = [padding, text] if left else [text, padding]
        rows = torch.cat([torch.cat(parts, 1), other])
        mask = torch.ones_like(rows)
        mask[0, :2] = 1 - int(left)
        mask[0, -2:] = int(left)
        # A bias of in_proj makes padding on the left count; upstream masks its input alone.
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias.data) if module.in_features == 16 else None
        with torch.no_grad():
            got = model(input_ids=rows, attention_mask=mask, use_cache=False).logits
            alone = model(input_ids=text, use_cache=False).logits[0]
            whole = model(input_ids=other, use_cache=False).logits[0]
        first = 2 if left else 0
        torch.testing.assert_close(got[0, first : first + LENGTH], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[1], whole, rtol=1e-4, atol=1e-5)


def test_padded_layout_is_the_layout_of_each_row() -> None:
    x = torch.randn(2, 5, 3)
    padded = PaddedLayout(torch.tensor([0, 2]), 2, 5)
    plain = layout(5, Affix(AffixTuning(2), 1, None))
    longer = padded.lengthened(x)
    assert torch.equal(longer[0], plain.lengthened(x)[0])
    assert torch.equal(longer[1], torch.cat([x[1, :2], torch.zeros(2, 3), x[1, 2:]]))
    assert torch.equal(padded.shortened(longer), x)
    tokens = torch.ones(3, 2)
    placed = padded.placed(longer.mT, tokens).mT
    assert torch.equal(placed[1], torch.cat([x[1, :2], tokens.T, x[1, 2:]]))


# --- What is done with adapted models. ------------------------------------------------------------


@pytest.mark.parametrize("mlp", [False, True])
def test_saved_loaded_copied_switched_off_and_removed(mlp: bool, tmp_path: Path) -> None:
    plain, model = build("mamba").eval(), build("mamba").eval()
    method = AffixTuning(K, mlp=mlp, decay=3.0)
    apply_methods(model, [ProdialConfig(r=2), method])
    with torch.no_grad():
        result = model(input_ids=ids()).logits
        before = plain(input_ids=ids()).logits
        assert not torch.allclose(result, before), "it does not begin at the pretrained function"
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(again(input_ids=ids()).logits, result)
        with adapter_disabled(model):
            assert torch.equal(model(input_ids=ids()).logits, before)
        save_adapter(model, tmp_path)
        other = build("mamba").eval()
        load_adapter(other, tmp_path)
        assert torch.equal(other(input_ids=ids()).logits, result)
        with pytest.raises(ValueError, match="affix-tuning cannot be merged"):
            merge_prodial(model)
        model.to(torch.bfloat16)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        model(input_ids=ids())
    groups = adapter_parameter_groups(model, weight_decay=0.1)
    tokens = {id(p) for n, p in model.named_parameters() if "affix" in n}
    decays = [g["weight_decay"] for g in groups for p in g["params"] if id(p) in tokens]
    assert decays == pytest.approx([0.3] * len(tokens))
    remove_prodial(other)
    assert torch.equal(other(input_ids=ids()).logits, before)
    assert not any("prodial" in name for module in other.modules() for name in vars(module))


def test_compiles_without_graph_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_stand_ins.install(monkeypatch)
    model = Model(Mamba, depth=1)
    apply_methods(model, [AffixTuning(K)])
    expected = model(ids() % 11)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output = compiled(ids() % 11)
    output.sum().backward()
    torch.testing.assert_close(output, expected)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_text_goes_on_after_a_prefix_only() -> None:
    model = build("mamba").eval()
    apply_methods(model, [AffixTuning(K, "infix")])
    with torch.no_grad():
        cache = model(input_ids=ids(1), use_cache=True)
        name = next(n for n in cache if "cache" in n)
        with pytest.raises(ValueError, match=r"call with use_cache=False, or use 'prefix'"):
            model(input_ids=ids(1)[:, :1], **{name: cache[name]})


@pytest.mark.parametrize(
    ("family", "method", "message"),
    [
        ("mamba", AffixTuning(position="suffix"), "they would have no effect"),
        ("jamba", AffixTuning(), "cannot insert tokens into model.layers.0.mamba"),
        ("linear", AffixTuning(), "finds no mixer of Mamba's in a Sequential"),
    ],
)
def test_refused(family: str, method: AffixTuning, message: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2)) if family == "linear" else build(family)
    with pytest.raises(ValueError, match=message):
        apply_methods(model, [method])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokens": 0}, ValueError, "tokens"),
        ({"tokens": True}, TypeError, "tokens must be an integer"),
        ({"position": "before"}, ValueError, "position must be one of"),
        ({"mlp": "no"}, TypeError, "mlp must be true or false"),
        ({"hidden": 4}, ValueError, "hidden=4 is the width of the network of mlp=True"),
    ],
)
def test_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AffixTuning(**options)


def test_lengths_that_tokens_lead_into_another_chunk_of_the_scan() -> None:
    model, other = build("mamba"), build("mamba2")
    said = costly_length(model, 2048, 3)
    assert said is not None
    assert "2,048 tokens and 3 learned ones are scanned as 4,096: 2,045 would be as 2,048" in said
    assert said.endswith("in 50% of the scan's time")
    for length, inserted in ((2045, 3), (2048, 0), (3000, 8), (100, 20)):
        assert costly_length(model, length, inserted) is None
    assert costly_length(other, 2048, 3) is None
