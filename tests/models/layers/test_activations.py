"""Levels on real models: the same gradients, the bytes that are planned, nothing left behind."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.models.layers.blocks import Calling, blocks_of, mixer_of
from prodial_kernels.models.layers.fused_norms import fuse_norms
from prodial_kernels.models.layers.recompute import CHECKPOINT, KEEP, NORM, RECOMPUTE, apply_levels
from prodial_kernels.ops import projection
from prodial_kernels.ops.operators import linear_forward
from prodial_kernels.training.memory.activations import kept, levels_of
from prodial_kernels.training.memory.part_bytes import Tokens
from prodial_kernels.training.memory.shapes import describe_model
from support.kernels import rms_norm_kernel
from support.live_storages import LiveStorages, bytes_kept
from support.mixers import cuda_stand_ins, mamba_ssm_stand_ins
from support.mixers.adapted_families import install_mamba_ssm
from support.models import FAMILIES, build, randomise_adapters, token_ids


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Of every trained parameter, with the same dropout every time."""
    torch.manual_seed(7)
    model.zero_grad(set_to_none=True)
    ours = isinstance(model, _Stack)
    output = model(ids) if ours else model(input_ids=ids, use_cache=False).logits
    output.float().square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found
    return {name: gradient.clone() for name, gradient in found.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def adapted(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    model = build(name, **overrides).to(dtype)
    apply_prodial(model, ProdialConfig(r=3, lora_dropout=0.2))
    randomise_adapters(model)
    return model.train()


@pytest.mark.parametrize("norms", ["eager", "fused"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_the_same_bit_for_bit(name: str, norms: str) -> None:
    model, ids = adapted(name), token_ids()
    if norms == "fused":
        assert len(fuse_norms(model)) >= 3
    expected = gradients(model, ids)
    shapes = describe_model(model, kernels=False).layers
    tried = {level for layer in shapes for level in levels_of(layer)}
    for level in sorted(tried - {KEEP}):
        levels = [level if level in levels_of(layer) else KEEP for layer in shapes]
        with apply_levels(model, levels):
            assert_equal(gradients(model, ids), expected)
    # Every other layer.
    with apply_levels(model, [(KEEP, CHECKPOINT)[i % 2] for i in range(len(shapes))]):
        assert_equal(gradients(model, ids), expected)
    assert_equal(gradients(model, ids), expected)


def fused_mamba(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> Any:
    """transformers' Mamba on the stand-ins of mamba_ssm's kernels, wide enough to count bytes."""
    import transformers

    cuda_stand_ins.install(monkeypatch)
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        hidden_size=64, num_hidden_layers=2, vocab_size=64, state_size=16
    )
    model: Any = transformers.MambaForCausalLM(config).to(dtype)
    apply_prodial(model, ProdialConfig(r=16))
    randomise_adapters(model)
    return model.train()


@pytest.mark.parametrize("norms", ["eager", "fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("level", [KEEP, NORM, RECOMPUTE, CHECKPOINT])
def test_mamba_keeps_what_the_plan_counts(
    level: str, dtype: torch.dtype, norms: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fused_mamba(monkeypatch, dtype)
    if norms == "fused":
        rms_norm_kernel.install(monkeypatch)
        assert len(fuse_norms(model)) == 3
    layer = describe_model(model, kernels=True).layers[1]
    x = torch.randn(2, 64, 64, requires_grad=True)
    with apply_levels(model, [level] * 2):
        found = bytes_kept(model.backbone.layers[1], x)
        assert cuda_stand_ins.calls["scan_fwd"] == 1
    expected = kept(layer, Tokens(2, 64, dtype.itemsize), level)
    if dtype is torch.float32:
        # Where nothing is rounded, a norm's input and a checkpoint are the block's input itself.
        expected -= {KEEP: 1, NORM: 1, RECOMPUTE: 1, CHECKPOINT: 1}[level] * x.nbytes
    assert found == pytest.approx(expected, rel=0.01, abs=1100)


def test_mamba2_keeps_what_the_plan_counts() -> None:
    model = mamba_ssm_stand_ins.Model(mamba_ssm_stand_ins.Mamba2, width=32)
    apply_prodial(model, ProdialConfig(r=16))
    block = model.train().layers[1]
    model.lm_head = model.head
    layer = describe_model(model, kernels=True).layers[1]
    assert (layer.mixer, layer.fused, layer.state) == ("mamba2", True, 4)
    x = torch.randn(2, 64, 32, requires_grad=True)
    found = bytes_kept(block.mixer, x)
    tokens = Tokens(2, 64, 4)
    # The plan counts the norm and its output, which is x, with the block; the norm's rstd is left.
    mixer = kept(layer, tokens, KEEP) - (4 + 4) * 128 * 32 - 4 * 128
    assert found == pytest.approx(mixer, rel=0.03)


@pytest.mark.parametrize("norms", ["eager", "fused"])
def test_recomputing_in_bfloat16_on_the_fused_path_changes_no_bit(
    norms: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fused_mamba(monkeypatch, torch.bfloat16)
    if norms == "fused":
        rms_norm_kernel.install(monkeypatch)
        fuse_norms(model)
    ids = torch.randint(0, 64, (2, 24))
    expected = gradients(model, ids)
    for level in (NORM, RECOMPUTE, CHECKPOINT):
        cuda_stand_ins.calls.clear()
        with apply_levels(model, [level] * 2):
            assert_equal(gradients(model, ids), expected)
        assert cuda_stand_ins.calls["scan_fwd"] == (4 if level == CHECKPOINT else 2)
    mixers = [mixer_of(block) for block in blocks_of(model)]
    assert not any(hasattr(mixer, "prodial_recompute_xz") for mixer in mixers)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_block_that_runs_again_multiplies_by_each_projector_twice(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``out_proj`` gives is at hand for its scale's gradient, and is not made once more."""
    if name == "mamba":
        cuda_stand_ins.install(monkeypatch)
    else:
        install_mamba_ssm(monkeypatch, name)
    model = build(name).half()
    apply_prodial(model, ProdialConfig(r=3, impl="triton"))
    randomise_adapters(model)
    block, x = blocks_of(model.train())[1], torch.randn(1, 16, 16)
    products = []

    def counted(*given: Any) -> Any:
        products.append(1)
        return linear_forward(*given)

    monkeypatch.setattr(projection, "linear_forward", counted)
    found = {}
    for level, times in ((KEEP, 3), (CHECKPOINT, 4)):
        products.clear()
        model.zero_grad(set_to_none=True)
        with apply_levels(model, [level] * len(blocks_of(model))):
            block(x.clone().requires_grad_()).float().square().mean().backward()
        assert len(products) == times, level
        found[level] = {n: p.grad for n, p in block.named_parameters() if p.grad is not None}
    if name == "mamba":
        # Of the output as it was given, and not of one whose input was rounded once more.
        for part in ("scale", "b"):
            one, other = (found[level].pop(f"mixer.out_proj.prodial_{part}") for level in found)
            torch.testing.assert_close(one, other, rtol=5e-3, atol=1e-4)
    assert_equal(found[CHECKPOINT], found[KEEP])


def test_a_checkpoint_is_kept_in_the_dtype_that_the_norm_reads() -> None:
    model = adapted("mamba2", torch.bfloat16)
    block = model.backbone.layers[1]
    x = torch.randn(2, 12, 16, requires_grad=True)  # the residual stream is fp32
    with apply_levels(model, [CHECKPOINT] * 2):
        assert bytes_kept(block, x) == 2 * 12 * 16 * 2


def test_memory_is_let_go_after_backward() -> None:
    model, ids = adapted("mamba"), token_ids()
    with apply_levels(model, [NORM, CHECKPOINT]), LiveStorages() as live:
        model(input_ids=ids).logits.sum().backward()
        model.zero_grad(set_to_none=True)
        assert live.bytes(without=model.parameters()) == 0


def test_evaluation_and_copies_are_as_before() -> None:
    model, ids = adapted("mamba2"), token_ids()
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    for level in (NORM, CHECKPOINT):
        with apply_levels(model, [level] * 2), torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, expected)
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert torch.equal(twin(input_ids=ids).logits, expected)


def test_names_and_classes_come_back() -> None:
    model = adapted("mamba")
    names = list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    applied = apply_levels(model, [NORM, CHECKPOINT])
    assert list(model.state_dict()) == names
    applied.remove()
    applied.remove()
    assert [type(module) for module in model.modules()] == classes


def test_a_mixers_own_setting_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fused_mamba(monkeypatch, torch.float32)
    mixer = model.backbone.layers[0].mixer
    mixer.prodial_recompute_xz = False
    with apply_levels(model, [RECOMPUTE, KEEP]):
        assert mixer.prodial_recompute_xz is True
    assert mixer.prodial_recompute_xz is False


class _Block(nn.Module):
    """mamba_ssm's block: the residual is passed beside the hidden states."""

    fused_add_norm = True

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mixer = mixer

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        residual = hidden if residual is None else hidden + residual
        return self.mixer(self.norm(residual)), residual


class _Stack(nn.Module):
    def __init__(self, mixer: type[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([_Block(mixer(8)) for _ in range(3)])
        self.head = nn.Linear(8, 11)
        self.get_output_embeddings = lambda: self.head

    def forward(self, ids: Tensor) -> Tensor:
        hidden, residual = self.embedding(ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return self.head(hidden + residual)


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2"])
def test_mamba_ssm_blocks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_stand_ins.install(monkeypatch)
    torch.manual_seed(0)
    model = _Stack(getattr(mamba_ssm_stand_ins, kind))
    apply_prodial(model, ProdialConfig(r=2))
    randomise_adapters(model)
    ids = torch.randint(0, 11, (2, 9))
    expected = gradients(model.train(), ids)
    layers = describe_model(model, kernels=True).layers
    last = RECOMPUTE if kind == "Mamba" else KEEP
    assert [levels_of(layer) for layer in layers] == 3 * [
        (KEEP, RECOMPUTE, CHECKPOINT) if kind == "Mamba" else (KEEP, CHECKPOINT)
    ]
    assert all(layer.two_streams and layer.fused for layer in layers)
    with apply_levels(model, [CHECKPOINT, last, KEEP]):
        assert_equal(gradients(model, ids), expected)
    # Both streams are kept.
    tokens = Tokens(2, 9, 4)
    assert kept(layers[0], tokens, CHECKPOINT) == 2 * 9 * 8 * (4 + 4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_in_training_is_refused(name: str) -> None:
    """Whatever this release of transformers calls it."""
    model = adapted(name)
    with (
        apply_levels(model, [CHECKPOINT] * len(blocks_of(model))),
        pytest.raises(ValueError, match=r"\w+ in training.*use_cache=False"),
    ):
        model(input_ids=token_ids(), use_cache=True)


def test_a_cache_by_position_is_refused_and_a_first_argument_by_keyword_is_checkpointed() -> None:
    model = adapted("mamba2")
    for layer in model.modules():
        layer.lora_dropout = 0.0
    block, x = model.backbone.layers[1], torch.randn(2, 7, 16, requires_grad=True)
    expected, whole = block(x), bytes_kept(block, x)
    with apply_levels(model, [CHECKPOINT] * 2):
        with pytest.raises(ValueError, match=r"in training.*use_cache=False"):
            block(x, DynamicCache())
        assert torch.equal(block(hidden_states=x), expected)
        by_keyword = Calling(block, lambda x: block(hidden_states=x))
        assert bytes_kept(by_keyword, x) == bytes_kept(block, x) < whole


class DynamicCache:
    """Stands for transformers' class of this name."""


def test_refuses_what_it_cannot_do() -> None:
    model = adapted("mamba2")
    with pytest.raises(ValueError, match="has 2 blocks, got 3 levels"):
        apply_levels(model, [KEEP] * 3)
    with pytest.raises(ValueError, match="level of block 1: expected one of"):
        apply_levels(model, [CHECKPOINT, "half"])
    # What was done before the error is undone.
    assert type(model.backbone.layers[0]).__mro__[1].__name__ != "Mamba2Block"
    hybrid = adapted("bamba")
    with pytest.raises(ValueError, match="has no norm of its own"):
        apply_levels(hybrid, [NORM] * len(blocks_of(hybrid)))
    with pytest.raises(ValueError, match=r"holds no nn\.ModuleList"):
        apply_levels(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match="has no embedding"):
        describe_model(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])), kernels=False)
