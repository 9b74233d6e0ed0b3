"""Rows of several documents: apart where the model resets its state, refused where it would not."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import apply_prodial, merge_prodial, remove_prodial
from prodial_kernels.models.layers.packed_rows import arguments_apart, leak_of
from support.mixers.adapted_families import CONFIG, install_stand_in
from support.models import FAMILIES, build, randomise_adapters, token_ids

APART = ["bamba", "falcon_h1", "zamba2", "nemotron_h"]
LEAKING = [name for name in FAMILIES if name not in APART]

IDS = token_ids(1, 12)
SEQ_IDX = torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(5), torch.arange(7)])[None]
BOTH = {"seq_idx": SEQ_IDX, "position_ids": POSITIONS, "use_cache": False}


def model_of(name: str, monkeypatch: pytest.MonkeyPatch, *, adapted: bool = True) -> nn.Module:
    """A model in training mode, on what stands in for the kernels."""
    if FAMILIES[name].fused:
        install_stand_in(monkeypatch, name)
    model = build(name)
    if adapted:
        apply_prodial(model, CONFIG)
        randomise_adapters(model)
    return model


def one_by_one(model: nn.Module) -> Tensor:
    documents = [IDS[:, :5], IDS[:, 5:]]
    return torch.cat([model(ids, use_cache=False).logits for ids in documents], dim=1)


def relative(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("name", APART)
def test_documents_are_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and every gradient of the adapter are those of the documents one by one."""
    model = model_of(name, monkeypatch)
    gradients = []
    outputs = []
    for logits in (lambda: one_by_one(model), lambda: model(IDS, **BOTH).logits):
        model.zero_grad(set_to_none=True)
        outputs.append(logits())
        outputs[-1].square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert relative(outputs[1], outputs[0]) < 1e-5
    assert gradients[0].keys() == gradients[1].keys()
    assert any("prodial_a" in key for key in gradients[0])
    for key, gradient in gradients[1].items():
        assert relative(gradient, gradients[0][key]) < 1e-4, key


@pytest.mark.parametrize("name", LEAKING)
def test_where_documents_would_leak_they_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And upstream, without an adapter, does leak. Where this fails, a release keeps them apart."""
    plain = model_of(name, monkeypatch, adapted=False)
    # zamba's convolution takes seq_idx, and refuses it without the kernel; its scan does not.
    given = {**BOTH, **({"seq_idx": None} if name == "zamba" else {})}
    assert relative(plain(IDS, **given).logits, one_by_one(plain)) > 1e-3
    model = model_of(name, monkeypatch)
    for arguments in (BOTH, {"position_ids": POSITIONS}, {"seq_idx": SEQ_IDX}):
        with pytest.raises(ValueError, match=r"runs? into the next, whatever|run into the next"):
            model(IDS, **arguments)
    assert arguments_apart(model) == frozenset()


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_idx": None}, "only if seq_idx says so too"),
        ({"position_ids": None}, "only if position_ids says so too"),
        ({"attention_mask": torch.ones_like(IDS)}, "only without attention_mask"),
        ({"use_cache": None}, "only without a cache"),
    ],
)  # fmt: skip
def test_what_keeps_documents_apart_must_be_whole(
    name: str, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these makes upstream's attention or recurrence leak without a word."""
    given = {key: value for key, value in {**BOTH, **change}.items() if value is not None}
    plain = model_of(name, monkeypatch, adapted=False)
    if "use_cache" in given:
        # With a cache the fused function is not called; the kernels beside it do not run here.
        assert relative(plain(IDS, **given).logits, one_by_one(plain)) > 1e-3
    model = model_of(name, monkeypatch)
    with pytest.raises(ValueError, match=message):
        model(IDS, **given)


@pytest.mark.parametrize("name", ["mamba2", "bamba", "jamba"])
@torch.no_grad()
def test_rows_of_one_document_are_taken_as_before(name: str) -> None:
    plain, model = build(name).eval(), build(name).eval()
    apply_prodial(model, CONFIG)
    padded = torch.tensor([[0, 0, *[1] * 10]])
    places = (padded.cumsum(-1) - 1).masked_fill(padded == 0, 1)
    for given in (
        {"position_ids": torch.arange(12)[None]},
        {"position_ids": torch.arange(3, 15)[None]},
        {"position_ids": places, "attention_mask": padded},
    ):
        expected = plain(IDS, use_cache=False, **given).logits
        assert torch.equal(model(IDS, use_cache=False, **given).logits, expected)
    text = {"max_new_tokens": 4, "do_sample": False, "attention_mask": padded, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **text), plain.generate(IDS, **text))


def test_the_guard_goes_with_the_adapter_and_stays_in_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("mamba2", monkeypatch)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for one, taken_out in zip(
        (model, *copies), (remove_prodial, merge_prodial, remove_prodial), strict=True
    ):
        with pytest.raises(ValueError, match="run into the next"):
            one(IDS, **BOTH)
        taken_out(one)
        one(IDS, **BOTH)
        assert not one._forward_pre_hooks


def test_a_model_of_another_kind_is_left_alone() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    apply_prodial(model, CONFIG.__class__(target_modules=["q_proj"], r=2, n_blocks=2))
    model(IDS, position_ids=POSITIONS, use_cache=False)
    assert not model._forward_pre_hooks


def test_mamba_ssm_resets_by_seq_idx_alone() -> None:
    class Mamba2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj, self.out_proj = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, u: Tensor, seq_idx: Tensor | None = None) -> Tensor:
            return u

    class Model(nn.Module):
        def __init__(self, mixer: nn.Module) -> None:
            super().__init__()
            self.mixer = mixer

        def forward(self, ids: Tensor, position_ids: Any = None, **kwargs: Any) -> Tensor:
            return ids

    model = Model(Mamba2())
    assert arguments_apart(model) == {"seq_idx"}
    assert leak_of(model, {"seq_idx": SEQ_IDX}) is None
    assert leak_of(model, {"seq_idx": SEQ_IDX, "position_ids": POSITIONS}) is None
    assert "only if seq_idx says so too" in str(leak_of(model, {"position_ids": POSITIONS}))


@pytest.mark.parametrize("name", APART)
def test_what_a_model_is_packed_by(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU with the kernels; without them upstream raises, so documents are padded there."""
    from prodial_kernels.models.layers import packed_rows

    model = build(name)
    assert arguments_apart(model) == frozenset()
    monkeypatch.setattr(packed_rows, "kernels_available", lambda: True)
    monkeypatch.setattr(Tensor, "is_cuda", True, raising=False)
    assert arguments_apart(model) == {"seq_idx", "position_ids"}
