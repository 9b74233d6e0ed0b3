"""Prompt-tuning: against longer inputs by hand, in decoding, under padding, in files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prodial_kernels import (
    AffixTuning,
    ProdialConfig,
    PromptTuning,
    adapter_disabled,
    apply_methods,
    load_adapter,
    merge_prodial,
    remove_prodial,
    save_adapter,
)
from prodial_kernels.models.layers.decoding import Reader
from support.mixers.mamba_ssm_stand_ins import Mamba, inference_params
from support.mixers.mamba_ssm_stand_ins import Model as Stack
from support.mixers.vision import images, tiny_vision_mamba
from support.models import build

K, LENGTH = 4, 11


def ids(batch: int = 2) -> Tensor:
    return torch.arange(2, 13)[None].repeat(batch, 1)


def tokens_of(model: nn.Module, path: str = "") -> Tensor:
    """[k, width], by the definition."""
    names = dict(model.named_parameters())
    own = {n.rpartition("prompt_")[2]: p for n, p in names.items() if "prompt_" in n}
    if "tokens" in own:
        return own["tokens"]
    return torch.tanh(own["embedding"] @ own["w1"].T + own["b1"]) @ own["w2"].T + own["b2"]


@pytest.mark.parametrize("mlp", [False, True], ids=["tokens", "network"])
@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "mamba2"])
def test_every_gradient_is_that_of_the_longer_text(name: str, mlp: bool) -> None:
    model = build(name).double()
    apply_methods(model, [PromptTuning(K, mlp=mlp, hidden=5 if mlp else None)])
    output = model(input_ids=ids(), labels=ids(), output_hidden_states=True)
    assert output.logits.shape[1] == LENGTH
    assert {states.shape[1] for states in output.hidden_states} == {LENGTH}
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(output.loss, trained)
    with adapter_disabled(model):
        prompt = tokens_of(model).expand(2, -1, -1)
        embedded = model.get_input_embeddings()(ids())
        logits = model(inputs_embeds=torch.cat([prompt, embedded], 1)).logits[:, K:]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.loss, loss)
    for got, expected in zip(found, torch.autograd.grad(loss, trained), strict=True):
        assert got.count_nonzero()
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_steps_padding_and_generation(name: str) -> None:
    model = build(name).eval()
    apply_methods(model, [PromptTuning(K), AffixTuning(2)])
    with torch.no_grad():
        whole = model(input_ids=ids(1), use_cache=False).logits[0]
        reader = Reader(model)
        steps = [reader.read(ids()[0, :5].tolist())]
        steps += [reader.read([int(token)]) for token in ids()[0, 5:]]
        assert reader.cached, reader.why
        torch.testing.assert_close(torch.stack(steps), whole[4:], rtol=1e-4, atol=1e-5)
        for module in model.modules():
            if hasattr(module, "conv1d") and module.in_proj.bias is not None:
                nn.init.zeros_(module.in_proj.bias)
        whole = model(input_ids=ids(1), use_cache=False).logits[0]
        rows = F.pad(ids(), (3, 0))
        rows[1] = 7
        mask = torch.ones_like(rows)
        mask[0, :3] = 0
        padded = model(input_ids=rows, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(padded[0, 3:], whole, rtol=1e-4, atol=1e-5)
        text = ids(1)
        for _ in range(3):
            logits = model(input_ids=text, use_cache=False).logits[:, -1:]
            text = torch.cat([text, logits.argmax(-1)], 1)
        made = model.generate(rows, attention_mask=mask, max_new_tokens=3, do_sample=False)
        assert torch.equal(made[:1, 3:], text)


class MixerModel(Stack):
    """Named and called as mamba_ssm's backbone."""

    def forward(self, input_ids: Tensor, inference_params: Any = None) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            normed = F.layer_norm(x, x.shape[-1:])
            x = x + layer.mixer(normed, inference_params=inference_params)
        return x


def test_mamba_ssm() -> None:
    model = MixerModel(Mamba)
    apply_methods(model, [PromptTuning(K)])
    tokens = ids() % 11
    with torch.no_grad():
        whole, cache = model(tokens), inference_params()
        outputs = [model(tokens[:, :4], inference_params=cache)]
        for place in range(4, LENGTH):
            cache.seqlen_offset = place
            outputs.append(model(tokens[:, place : place + 1], inference_params=cache))
    assert whole.shape[1] == LENGTH
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mlp", [False, True], ids=["tokens", "network"])
@pytest.mark.parametrize(("k", "position"), [(8, "auto"), (3, "both"), (3, "prefix")])
def test_around_the_patches(k: int, position: str, mlp: bool) -> None:
    model = tiny_vision_mamba().double()
    apply_methods(model, [PromptTuning(k, position, mlp=mlp)])
    x = images().double()
    output = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(output.square().sum(), trained)
    before = k if position == "prefix" else (k + 1) // 2
    with adapter_disabled(model):
        patches = model.patch_embed(x)
        middle = patches.shape[1] // 2
        token = model.cls_token.expand(len(x), -1, -1)
        sequence = torch.cat([patches[:, :middle], token, patches[:, middle:]], 1)
        prompt = tokens_of(model).expand(len(x), -1, -1)
        parts = [prompt[:, :before], sequence + model.pos_embed, prompt[:, before:]]
        logits = model.head(model.encode(torch.cat(parts, 1))[:, before + middle])
    torch.testing.assert_close(output, logits)
    expected = torch.autograd.grad(logits.square().sum(), trained)
    for got, exact in zip(found, expected, strict=True):
        assert got.count_nonzero()
        torch.testing.assert_close(got, exact)


def test_saved_loaded_and_removed(tmp_path: Path) -> None:
    model = build("mamba").eval()
    with torch.no_grad():
        before = model(input_ids=ids()).logits
        apply_methods(model, [ProdialConfig(r=2), PromptTuning(K, mlp=True)])
        result = model(input_ids=ids()).logits
        assert torch.equal(copy.deepcopy(model)(input_ids=ids()).logits, result)
        save_adapter(model, tmp_path)
        other = build("mamba").eval()
        load_adapter(other, tmp_path)
        assert torch.equal(other(input_ids=ids()).logits, result)
        with pytest.raises(ValueError, match="prompt-tuning cannot be merged"):
            merge_prodial(model)
        remove_prodial(model)
        assert torch.equal(model(input_ids=ids()).logits, before)


@pytest.mark.parametrize(
    ("family", "method"), [("mamba2", PromptTuning(K)), ("bamba", AffixTuning(K))]
)
def test_rows_of_several_texts_are_refused(family: str, method: Any) -> None:
    """Only the first text of a row would get the tokens."""
    model = build(family)
    apply_methods(model, [method])
    rows = torch.zeros_like(ids(), dtype=torch.int32)
    with pytest.raises(ValueError, match=r"seq_idx says where texts begin .* a row of its own"):
        model.base_model(input_ids=ids(), seq_idx=rows)


@pytest.mark.parametrize(
    ("family", "method", "message"),
    [
        ("mamba", PromptTuning(position="both"), "tokens behind the sequence would have no effect"),
        ("bamba", PromptTuning(), r"knows no place in a BambaForCausalLM \(model_type 'bamba'\)"),
    ],
)
def test_refused(family: str, method: PromptTuning, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_methods(build(family), [method])
