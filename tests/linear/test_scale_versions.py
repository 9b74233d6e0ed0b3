"""State dicts from before and after the scale was kept as s − 1."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels.scale_versions import from_first_version
from support.trained_layers import plain, trained


def first_version(layer: nn.Module) -> dict[str, Tensor]:
    """``state_dict`` as version 0.1.0 made it: s itself, and version 1 in the notes."""
    state = layer.state_dict()
    for name in state:
        if name.endswith("prodial_scale"):
            state[name] = state[name] + 1
    for note in state._metadata.values():
        note["version"] = 1
    return state


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_the_first_version_is_converted(assign: bool) -> None:
    source, target = nn.Sequential(trained()), nn.Sequential(trained(plain(), seed=5))
    target.load_state_dict(first_version(source), assign=assign)
    torch.testing.assert_close(target[0].prodial_scale, source[0].prodial_scale)
    x = torch.randn(3, 42)
    torch.testing.assert_close(target(x), source(x))


def test_todays_state_dict_is_taken_as_it_is() -> None:
    source, target = trained(), trained(seed=5)
    with torch.no_grad():
        # As if trained to s = 2: no reason for a word where the note says what it is.
        source.prodial_scale += 1
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.prodial_scale, source.prodial_scale)


def test_a_state_of_a_version_to_come_is_refused() -> None:
    layer = trained()
    before = layer.prodial_scale.detach().clone()
    state = nn.Sequential(trained(seed=5)).state_dict()
    state._metadata["0"]["version"] = 3
    with pytest.raises(ValueError, match=r"state of 0 is of version 3.*reads versions 1 to 2"):
        nn.Sequential(layer).load_state_dict(state)
    assert torch.equal(layer.prodial_scale, before)
    vars(layer)["_prodial_scale_version"] = 3
    with pytest.raises(ValueError, match="pickled layer is of version 3"):
        pickle.loads(pickle.dumps(layer))


def test_without_a_note_what_looks_like_s_is_warned_of() -> None:
    layer = trained()
    old = dict(first_version(layer))
    with pytest.warns(UserWarning, match=r"prodial_scale lies around 1.*subtract 1.*as it is"):
        layer.load_state_dict(old)
    assert torch.equal(layer.prodial_scale, old["prodial_scale"])


@pytest.mark.parametrize("moved", [0.0, 0.1, -0.3, 0.45])
def test_without_a_note_no_false_alarm(moved: float) -> None:
    layer = trained()
    state = dict(layer.state_dict())
    state["prodial_scale"] = moved + 0.05 * torch.randn(29, generator=torch.Generator())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.load_state_dict(state)


def test_a_pickle_of_the_first_version_is_converted() -> None:
    layer = trained()
    expected = layer.prodial_scale.detach().clone()
    old = copy.deepcopy(layer)
    with torch.no_grad():
        old.prodial_scale += 1
    del vars(old)["_prodial_scale_version"]
    buffer = io.BytesIO()
    torch.save(nn.Sequential(old), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)[0]
    torch.testing.assert_close(loaded.prodial_scale, expected)
    for again in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(again.prodial_scale, loaded.prodial_scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_conversion_is_exact_around_one(dtype: torch.dtype) -> None:
    s = torch.linspace(0.5, 2, 1001).to(dtype)
    assert torch.equal(from_first_version(s).double(), s.double() - 1)
