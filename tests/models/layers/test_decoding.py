"""Decoding token by token gives what one forward gives, in every family, and why that takes care.

Tests named ``upstream`` hold what transformers does wrong. When one fails, upstream has changed:
the care that it names may not be needed from that release on.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import apply_prodial
from prodial_kernels.models.layers import decoding
from prodial_kernels.models.layers.decoding import Reader, biased_projections, clamp_steps
from prodial_kernels.models.mixers.arguments import is_cache
from support.mixers.adapted_families import CONFIG
from support.models import FAMILIES, build, randomise_adapters, token_ids

_LIMITS = {"time_step_limit": (0.7, 0.8)}
CLAMPED: dict[str, dict[str, Any]] = {
    "mamba2": _LIMITS, "bamba": _LIMITS, "falcon_h1": _LIMITS, "granitemoehybrid": _LIMITS,
    "zamba2": {"time_step_min": 0.7}, "nemotron_h": {"time_step_min": 0.7},
}  # fmt: skip
"""Options by which the limits of dt matter for nearly every token of a tiny model."""

FORGET = ["mamba", "falcon_mamba", "jamba", "zamba"]


def model_of(name: str, **options: Any) -> nn.Module:
    model = build(name, **options).eval()
    return model.requires_grad_(False)


def whole(model: nn.Module, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids]), use_cache=False).logits[0]


def greedy(model: nn.Module, ids: list[int], n: int) -> tuple[list[int], Reader, float]:
    """Decode ``n`` tokens; return them, the reader, and the largest error of its logits."""
    reader, tokens, worst = Reader(model), list(ids), 0.0
    logits = reader.read(tokens)
    for _ in range(n):
        expected = whole(model, tokens)[-1]
        worst = max(worst, float((logits - expected).norm() / expected.norm()))
        tokens.append(int(logits.argmax()))
        logits = reader.read(tokens[-1:])
    return tokens[len(ids) :], reader, worst


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_token_is_that_of_one_forward(name: str, adapted: bool) -> None:
    model = model_of(name, **CLAMPED.get(name, {}))
    if adapted:
        apply_prodial(model, CONFIG)
        randomise_adapters(model)
    classes = [type(module) for module in model.modules()]
    ids = token_ids(1, 9)[0].tolist()
    with clamp_steps(model):
        tokens, reader, worst = greedy(model, ids, 8)
        expected = whole(model, ids + tokens[:-1])[len(ids) - 1 :].argmax(-1).tolist()
    assert reader.cached, reader.why
    assert worst < 2e-5
    assert tokens == expected
    assert classes == [type(module) for module in model.modules()]


@pytest.mark.parametrize("name", FORGET)
@torch.no_grad()
def test_upstream_mamba1_caches_forget_when_several_tokens_are_given(name: str) -> None:
    model = model_of(name)
    ids = token_ids(1, 24)
    first = model(ids[:, :16], use_cache=True)
    cache = {key: value for key, value in first.items() if is_cache(key, value)}
    second = model(ids[:, 16:], use_cache=True, **cache).logits[0]
    assert relative(second, whole(model, ids[0].tolist())[16:]) > 1e-5


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "mamba2", "jamba"])
def test_upstream_a_second_turn_reads_the_text_on_top_of_the_old_state(name: str) -> None:
    """``generate`` with the cache of the first turn; hybrids with a Mamba-2 take it up rightly."""
    model = model_of(name)
    options: dict[str, Any] = {
        "max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True,
        "output_logits": True, "pad_token_id": 0,
    }  # fmt: skip
    first = model.generate(token_ids(1, 16), **options)
    cache = next(value for key, value in first.items() if is_cache(key, value))
    named = next(
        key for key in ("cache", "past_key_values", "cache_params")
        if key in inspect.signature(model.forward).parameters
    )  # fmt: skip
    second = torch.cat([first.sequences, token_ids(1, 5, seed=3)], dim=1)
    expected = model.generate(second, **options).logits[0]
    found = model.generate(second, **{named: cache}, **options).logits[0]
    assert relative(found, expected) > 1e-5


@torch.no_grad()
def test_upstream_bamba_counts_positions_from_0_in_every_call() -> None:
    model = model_of("bamba")
    ids = token_ids(1, 24)
    first = model(ids[:, :23], use_cache=True)
    cache = {key: value for key, value in first.items() if is_cache(key, value)}
    expected = whole(model, ids[0].tolist())[23:]
    assert relative(model(ids[:, 23:], use_cache=True, **cache).logits[0], expected) > 1e-3


@pytest.mark.parametrize("name", CLAMPED)
@torch.no_grad()
def test_upstream_steps_do_not_clamp_dt(name: str) -> None:
    model = model_of(name, **CLAMPED[name])
    _, reader, worst = greedy(model, token_ids(1, 9)[0].tolist(), 8)
    assert worst > 1e-5 or not reader.cached


BIAS = {
    "mamba": "use_bias", "falcon_mamba": "use_bias", "mamba2": "use_bias", "nemotron_h": "use_bias",
    "zamba2": "add_bias_linear",
}  # fmt: skip
"""Of each family, the option of a bias in its projectors; of the others ``mamba_proj_bias``."""


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_padding_on_the_left_is_seen_through_a_bias_of_in_proj(name: str, biased: bool) -> None:
    """Upstream's; where it fails with a bias, :func:`biased_projections` is needed no longer."""
    model = model_of(name, **{BIAS.get(name, "mamba_proj_bias"): biased})
    ids = token_ids(1, 12)
    mask = torch.tensor([[0] * 5 + [1] * 12])
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), ids], dim=1)
    given = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    given = {k: v for k, v in given.items() if k in inspect.signature(model.forward).parameters}
    found = model(padded, attention_mask=mask, use_cache=False, **given).logits[0, 5:]
    error = relative(found, whole(model, ids[0].tolist()))
    assert bool(biased_projections(model)) is biased
    assert error > 1e-3 if biased else error < 1e-5


@torch.no_grad()
def test_a_cache_that_changes_what_is_computed_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bamba's without positions, which a release of another model may bring along."""
    model = model_of("bamba")
    call = Reader._call

    def without_positions(self: Reader, tokens: list[int], places: Tensor, **inputs: Any) -> Any:
        return call(self, tokens, torch.arange(len(tokens)), **inputs)

    monkeypatch.setattr(Reader, "_call", without_positions)
    ids = token_ids(1, 24)[0].tolist()
    _, reader, worst = greedy(model, ids, 4)
    assert not reader.cached
    assert "differ by" in str(reader.why)
    assert worst < 2e-5


@torch.no_grad()
def test_a_model_without_a_cache_is_read_anew() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model_of("mamba2")

        def get_input_embeddings(self) -> nn.Module:
            return self.model.get_input_embeddings()

        def forward(self, input_ids: Tensor, use_cache: bool | None = None) -> Any:
            return self.model(input_ids, use_cache=False)

    tokens, reader, worst = greedy(Plain(), [5, 6, 7], 3)
    assert not reader.cached
    assert worst == 0
    assert len(tokens) == 3


def test_several_tokens_after_the_first_call_are_refused() -> None:
    reader = Reader(model_of("mamba"))
    with torch.no_grad():
        reader.read([5, 6, 7])
    for tokens in ([8, 9], []):
        with pytest.raises(ValueError, match="one token in every other"):
            reader.read(tokens)


@torch.no_grad()
def test_steps_are_clamped_on_a_kernel_as_on_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """mamba_ssm's kernel recognises by strides that all features of a head share one dt."""
    model = model_of("nemotron_h", time_step_min=0.7)
    modeling = __import__(type(model).__module__, fromlist=["_"])
    original, seen = getattr(modeling, decoding.STEP), []

    def kernel(state: Tensor, x: Tensor, dt: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bias = kwargs["dt_bias"]
        assert not kwargs["dt_softplus"]
        assert bias.count_nonzero() == 0
        assert bias.shape == dt.shape[1:]
        assert dt.stride(-1) == bias.stride(-1) == 0
        seen.append(float(dt.min()))
        return original(state, x, dt, *args, **kwargs)

    monkeypatch.setattr(modeling, decoding.STEP, kernel)
    with clamp_steps(model):
        greedy(model, [5, 6, 7], 2)
    assert min(seen) == pytest.approx(0.7)
