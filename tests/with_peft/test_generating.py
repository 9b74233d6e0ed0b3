"""Text of models under PEFT: adapters take part, and prompts are not put before every token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from prodial_kernels.models.layers.decoding import Reader
from support.models import build, token_ids
from support.peft_models import adapted

IDS = token_ids(1, 9)


def greedy(model: Any, n: int = 8) -> tuple[list[int], Reader]:
    reader, tokens = Reader(model), []
    logits = reader.read(IDS[0].tolist())
    for _ in range(n):
        tokens.append(int(logits.argmax()))
        logits = reader.read(tokens[-1:])
    return tokens, reader


def of_forwards(model: Any, n: int = 8) -> list[int]:
    ids = IDS
    for _ in range(n):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, IDS.shape[1] :].tolist()


@torch.no_grad()
def test_an_adapter_of_peft_takes_part() -> None:
    model = adapted("bamba").eval()
    tokens, reader = greedy(model)
    assert reader.cached
    assert tokens == of_forwards(model)
    with model.disable_adapter():
        assert tokens != greedy(model)[0]


# PEFT says that it leaves out the position ids it is given.
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("name", ["mamba2", "falcon_h1"])
@torch.no_grad()
def test_prompt_tuning_reads_the_prompt_once(name: str) -> None:
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(build(name), settings).eval()
    tokens, reader = greedy(model)
    expected = of_forwards(model)
    assert tokens == expected
    assert "prompt tuning" in str(reader.why)
    # What upstream does wrong: when this fails, PEFT's caches can be used from that release on.
    mask = torch.ones_like(IDS)
    by_cache = model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert by_cache[0, -8:].tolist() != expected
