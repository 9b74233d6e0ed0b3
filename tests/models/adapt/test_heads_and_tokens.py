"""Heads of classifiers and embeddings with added tokens: trained, saved, merged with adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from prodial_kernels import (
    ProdialConfig,
    adapter_parameter_groups,
    apply_prodial,
    load_adapter,
    merge_prodial,
    save_adapter,
)
from prodial_kernels.checkpoint import AdapterError
from support.mixers.other_families import OTHERS
from support.models import FAMILIES, build, token_ids

_TOKENS = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
LR = 1e-5


def classifier(name: str, task: str = "Sequence") -> nn.Module:
    """A classifier of three classes in bf16, as many are loaded."""
    known = FAMILIES.get(name)
    prefix, options = (known.prefix, known.options) if known else OTHERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**_TOKENS, **options}, num_labels=3)
    return getattr(transformers, f"{prefix}For{task}Classification")(config).bfloat16()


def train(model: nn.Module, steps: int = 3, **inputs: Any) -> None:
    groups = adapter_parameter_groups(model, weight_decay=0.0)
    optimizer = torch.optim.AdamW(groups, lr=LR)
    for _ in range(steps):
        model.train()(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def master(layer: nn.Module) -> Tensor:
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight


CLASSIFIERS = [("jamba", "Sequence"), ("zamba2", "Sequence")]
if "qwen3_next" in OTHERS:
    CLASSIFIERS += [("qwen3_next", "Sequence"), ("qwen3_next", "Token")]


@pytest.mark.parametrize(("name", "task"), CLASSIFIERS)
def test_heads_of_classifiers(name: str, task: str, tmp_path: Path) -> None:
    model = classifier(name, task)
    base = copy.deepcopy(model)
    apply_prodial(model, ProdialConfig(r=2, target_modules="mixer", modules_to_save=("score",)))
    ids = token_ids()
    labels = torch.tensor([0, 2]) if task == "Sequence" else ids % 3
    before = master(model.score).detach().clone()
    train(model, input_ids=ids, labels=labels)
    # bf16 would have rounded each of these steps away.
    moved = (master(model.score).detach() - before).abs().max()
    assert master(model.score).dtype == torch.float32
    assert LR < float(moved) < 4 * LR
    logits = model(input_ids=ids).logits
    save_adapter(model, tmp_path)
    with torch.no_grad():
        # A head of the base is drawn anew by every process.
        base.score.weight.normal_()
    load_adapter(base.eval(), tmp_path)
    assert torch.equal(base(input_ids=ids).logits, logits)
    merge_prodial(model)
    assert model.score.weight.dtype == torch.bfloat16
    torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("name", ["mamba", "bamba"])
def test_embeddings_with_added_tokens(name: str, tmp_path: Path) -> None:
    """Tied to the head in Mamba, beside it in Bamba."""
    model = build(name).bfloat16()
    model.resize_token_embeddings(51, mean_resizing=False)
    embedding = model.get_input_embeddings()
    tied = model.lm_head.weight is embedding.weight
    assert tied == (name == "mamba")
    names = ("embeddings",) if tied else ("embed_tokens", "lm_head")
    apply_prodial(model, ProdialConfig(r=2, modules_to_save=names))
    ids = token_ids().clone()
    ids[:, 0] = 49
    before = master(embedding).detach().clone()
    train(model, input_ids=ids, labels=ids, use_cache=False)
    moved = (master(embedding).detach() - before).abs()
    assert LR < float(moved[49].max()) < 4 * LR
    assert (master(model.lm_head) is master(embedding)) == tied
    logits = model(input_ids=ids, use_cache=False).logits
    save_adapter(model, tmp_path / "adapter")
    again = build(name).bfloat16().eval()
    with pytest.raises(AdapterError, match=r"call model\.resize_token_embeddings\(51\) first"):
        load_adapter(again, tmp_path / "adapter")
    again.resize_token_embeddings(51, mean_resizing=False)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(input_ids=ids, use_cache=False).logits, logits)
    merge_prodial(model)
    assert (model.lm_head.weight is embedding.weight) == tied
    assert bool(model.config.tie_word_embeddings) == tied
    model.save_pretrained(tmp_path / "merged")
    plain = type(model).from_pretrained(tmp_path / "merged").eval()
    found = plain(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, logits, rtol=0.05, atol=0.05)
