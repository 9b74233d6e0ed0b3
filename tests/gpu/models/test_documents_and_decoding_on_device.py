"""On mamba_ssm's kernels: documents that share a row, tokens one by one, and what is repeatable."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.models.layers.decoding import Reader, clamp_steps
from prodial_kernels.models.layers.packed_rows import arguments_apart
from support import mamba_ssm_loaded  # noqa: F401
from support.models import FAMILIES, build, randomise_adapters, token_ids, training_step

pytestmark = pytest.mark.gpu

CONFIG = ProdialConfig(r=8, lora_alpha=1, block_size={"in_proj": 16, "out_proj": 32})
_MIXER = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 32, "mamba_chunk_size": 64}
_H1 = {**_MIXER, "mamba_d_ssm": 512, "head_dim": 64, "mamba_rms_norm": True}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {"state_size": 16}),
    "falcon_mamba": ("falcon_mamba", {"state_size": 16}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 64, "state_size": 32, "chunk_size": 64}),
    "jamba": ("jamba", {"mamba_d_state": 16, "mamba_dt_rank": 16}),
    "zamba": ("zamba", {"mamba_d_state": 16, "mamba_dt_rank": 16}),
    "bamba": ("bamba", _MIXER),
    "zamba2": ("zamba2", {"n_mamba_heads": 8, "mamba_d_state": 32, "chunk_size": 64}),
    "falcon_h1, norm last": ("falcon_h1", {**_H1, "mamba_norm_before_gate": False}),
    "falcon_h1, norm first": ("falcon_h1", {**_H1, "mamba_norm_before_gate": True}),
    "granitemoehybrid": ("granitemoehybrid", _MIXER),
    "nemotron_h": (
        "nemotron_h",
        {"mamba_num_heads": 8, "mamba_head_dim": 64, "ssm_state_size": 32, "chunk_size": 64,
         "head_dim": 64},
    ),
}  # fmt: skip
APART = [
    n for n in OPTIONS if n.partition(",")[0] in ("bamba", "zamba2", "falcon_h1", "nemotron_h")
]
# The scan's backward of Mamba-1 adds up in an order that differs from run to run.
REPEATABLE = [n for n, (family, _) in OPTIONS.items() if FAMILIES[family].fused != "mamba_inner_fn"
              and family not in ("jamba", "zamba")]  # fmt: skip
LENGTHS = (37, 91, 64)
IDS = token_ids(2, sum(LENGTHS))


def adapted(name: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    family, sizes = OPTIONS[name]
    # Rounded to 16 bits in every dtype, so that all start from the same weights.
    model = build(family, hidden_size=256, **{**sizes, **options}).bfloat16().to(dtype)
    apply_prodial(model, CONFIG)
    randomise_adapters(model)
    return model.cuda()


def step(model: nn.Module, ids: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits and gradients of one step over documents one by one, or side by side."""
    model.train().zero_grad(set_to_none=True)
    if given:
        logits = model(ids, use_cache=False, **given).logits
    else:
        parts = ids.split(LENGTHS, dim=1)
        logits = torch.cat([model(part, use_cache=False).logits for part in parts], dim=1)
    logits.float().square().mean().backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in trained.values())
    return {"logits": logits.detach(), **trained}


def apart() -> dict[str, Tensor]:
    numbers = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)])
    places = torch.cat([torch.arange(n) for n in LENGTHS])
    return {
        "seq_idx": numbers.int().expand(2, -1).contiguous().cuda(),
        "position_ids": places.expand(2, -1).contiguous().cuda(),
    }


@pytest.mark.parametrize("name", APART)
def test_documents_that_share_a_row_are_those_one_by_one(name: str) -> None:
    ids = IDS.cuda()
    exact = step(adapted(name, torch.float32), ids, {})
    model = adapted(name, torch.bfloat16)
    assert arguments_apart(model) == {"seq_idx", "position_ids"}
    alone, shared = step(model, ids, {}), step(model, ids, apart())
    joined = model(ids, use_cache=False).logits
    for key, value in exact.items():
        allowed = 2 * (alone[key].float() - value).norm()
        allowed += torch.finfo(torch.bfloat16).eps * value.norm()
        error = (shared[key].float() - value).norm()
        print(f"{name} {key}: {error / value.norm():.1e} of {allowed / value.norm():.1e}")
        assert error <= allowed, key
    # As a control: joined texts are something else.
    leak = (joined.float() - exact["logits"]).norm() / exact["logits"].norm()
    assert leak > 5 * (shared["logits"].float() - exact["logits"]).norm() / exact["logits"].norm()


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_tokens_one_by_one_are_those_of_one_forward(name: str) -> None:
    family = OPTIONS[name][0]
    low = {"zamba2": {"time_step_min": 0.7}, "nemotron_h": {"time_step_min": 0.7}}
    limits = {"time_step_limit": (0.7, 0.8)}
    clamped = family in ("mamba2", "bamba", "falcon_h1", "granitemoehybrid")
    options = low.get(family, limits if clamped else {})
    model = adapted(name, torch.float32, **options).eval()
    tokens = IDS[0, :70].tolist()
    worst = 0.0
    with clamp_steps(model):
        reader = Reader(model)
        logits = reader.read(tokens)
        for _ in range(12):
            expected = model(torch.tensor([tokens]).cuda(), use_cache=False).logits[0, -1]
            worst = max(worst, float((logits - expected).norm() / expected.norm()))
            tokens.append(int(expected.argmax()))
            logits = reader.read(tokens[-1:])
    print(f"{name}: {worst:.1e}, {reader.why}")
    assert reader.cached, reader.why
    assert worst < 1e-2


@pytest.mark.parametrize("name", REPEATABLE)
def test_gradients_are_repeatable_bit_for_bit(name: str) -> None:
    model = adapted(name, torch.bfloat16)
    first, second = (training_step(model, IDS.cuda()) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    for key, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[key]), key
