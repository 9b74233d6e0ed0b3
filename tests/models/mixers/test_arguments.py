"""What upstream's arguments mean, under any name and by position."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prodial_kernels import merge_prodial
from prodial_kernels.models.mixers.arguments import cache_among, mask_among, named_arguments
from support.mixers import cuda_stand_ins
from support.mixers.adapted_families import adapt, fused_mixers, install_stand_in
from support.models import token_ids


class DynamicCache:
    """Stands for one of transformers' caches."""


class _Mine(DynamicCache):
    pass


CACHE = DynamicCache()


def method(self: Any, hidden: Any, cache: Any = None, /, padding_mask: Any = None, *, flag: int = 0,
           **kwargs: Any) -> None:  # fmt: skip
    """A signature of every kind."""


def test_arguments_are_named_by_the_signature_and_never_refused() -> None:
    assert named_arguments(method, (1, 2), {"flag": 3, "other": 4}) == {
        "hidden": 1, "cache": 2, "flag": 3, "other": 4,
    }  # fmt: skip
    assert list(named_arguments(method, (1, 2, 3, 4), {})) == [
        "hidden", "cache", "padding_mask", "argument 3",
    ]  # fmt: skip
    assert named_arguments(lambda *args: None, (1,), {}) == {"argument 0": 1}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, object()) for name in (
            "cache", "cache_params", "past_key_values", "past_key_value", "past", "layer_cache",
            "inference_params", "kv_cache",
        )),
        ("past_key_values", ((torch.zeros(1), torch.zeros(1)),)),
        ("conv_state", torch.zeros(1)),
        ("ssm_states", torch.zeros(1)),
        # By what it is, whatever the argument is called.
        ("memory", CACHE), ("argument 1", _Mine()), ("memory", [CACHE]),
        ("memory", SimpleNamespace(update_conv_state=1)),
        ("memory", SimpleNamespace(key_value_memory_dict={})),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_caches(name: str, value: Any) -> None:
    assert cache_among({"hidden_states": torch.zeros(1), name: value}) == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cache", None), ("use_cache", True), ("cache", False), ("cache_position", torch.arange(3)),
        ("cache_seqlens", torch.arange(3)), ("cache_implementation", "static"),
        ("hidden_states", torch.zeros(1)), ("transformer_hidden_states", torch.zeros(1)),
        ("position_embeddings", (torch.zeros(1), torch.zeros(1))), ("config", object()),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_what_is_no_cache(name: str, value: Any) -> None:
    assert cache_among({name: value}) is None


def test_masks() -> None:
    assert mask_among({"hidden": 1, "attention_mask": None}) == "attention_mask"
    assert mask_among({"hidden": 1}) is None


def calls_of_mixers(model: torch.nn.Module, **inputs: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """What the mixers of a plain model are called with."""
    found: list[Any] = []
    handles = [
        mixer.register_forward_pre_hook(
            lambda module, args, kwargs: found.append((args, kwargs)), with_kwargs=True
        )
        for mixer in fused_mixers(model)
    ]
    with torch.no_grad():
        model(input_ids=token_ids(), **inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.filterwarnings("ignore:`cache_params` is deprecated:FutureWarning")
@pytest.mark.parametrize("how", ["as upstream calls it", "by position", "another name"])
def test_a_cache_in_training_is_filled(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused path has no states to write, so it must not run."""
    model = adapt("mamba")
    plain = merge_prodial(copy.deepcopy(model))
    upstream = install_stand_in(monkeypatch, "mamba")
    cuda_stand_ins.install(monkeypatch)
    states = []
    for mixer in (fused_mixers(plain)[0], fused_mixers(model)[0]):
        args, kwargs = calls_of_mixers(plain, use_cache=True)[0]
        arguments = named_arguments(type(mixer).forward, args, kwargs)
        name = cache_among(arguments)
        assert name is not None
        # The plain model's own call has filled it.
        cache = type(arguments[name])(config=model.config)
        arguments[name] = cache
        hidden = arguments.pop("hidden_states")
        if how == "by position":
            output = mixer(hidden, cache, arguments.get("attention_mask"))
        elif how == "another name":
            # What transformers <= 5.23 called it; 5.24 still takes that, through **kwargs.
            output = mixer(hidden_states=hidden, cache_params=cache)
        else:
            output = mixer(hidden, **arguments)
        layer = cache.layers[0]
        states.append((output, layer.conv_states, layer.recurrent_states))
    assert cuda_stand_ins.calls["scan_fwd"] == 0
    assert not upstream
    for found, expected in zip(*map(flatten, reversed(states)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # Without a cache it is fused, however the input is given.
    hidden = torch.randn(2, 7, 16)
    fused = fused_mixers(model)[0]
    first = fused(hidden)
    assert torch.equal(fused(hidden_states=hidden, attention_mask=None), first)
    assert cuda_stand_ins.calls["scan_fwd"] == 2


def flatten(states: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    if isinstance(states, torch.Tensor):
        return [states]
    parts = states.values() if isinstance(states, dict) else states
    return [tensor for part in parts for tensor in flatten(part)]
