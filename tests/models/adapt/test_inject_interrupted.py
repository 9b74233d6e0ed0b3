"""Whatever stops a change to a model, and wherever, the model is as it was or can be finished."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from prodial_kernels import (
    ProdialConfig,
    ProdialLinear,
    apply_prodial,
    merge_prodial,
    merge_quantized,
    module_tree,
    remove_prodial,
    save_adapter,
)
from prodial_kernels.checkpoint import AdapterError
from prodial_kernels.models import patch_point
from prodial_kernels.models.adapt import inject, masters
from prodial_kernels.models.adapt import snapshot as snapshots
from support.mixers.snapshots import CONFIG, EVERYTHING, snapshot
from support.mixers.toy import Toy, toy_ids
from support.models import build, randomise_adapters, token_ids


class Stop(BaseException):
    """As KeyboardInterrupt: no ordinary handler stops it."""


@contextmanager
def stopped_after(n_lines: int, *modules: Any) -> Iterator[list[int]]:
    """Raise ``Stop`` before the n-th line that runs in one of the modules; count the lines."""
    files = {module.__file__ for module in modules}
    lines = [0]

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        # Going back is not stopped: an interrupt within it is one too many.
        if frame.f_code.co_name in ("restore", "_set_flag"):
            return None
        if event == "line":
            lines[0] += 1
            if lines[0] == n_lines:
                raise Stop
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


MODULES = (inject, masters, module_tree, patch_point, snapshots)


def half(name: str) -> nn.Module:
    """A 16-bit model, so that there are masters to make as well."""
    return (Toy() if name == "toy" else build(name)).to(torch.bfloat16)


@pytest.mark.parametrize("name", ["toy", "mamba2"])
def test_apply_leaves_the_model_as_it_was(name: str) -> None:
    saved = ("norm", "conv1d") if name == "toy" else ("norm_f", "A_log")
    config = ProdialConfig(r=2, modules_to_save=saved)
    model = half(name)
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    types = [type(module) for module in model.modules()]
    dtypes = [parameter.dtype for parameter in model.parameters()]
    stops = 0
    for n_lines in itertools.chain(range(1, 60, 7), range(60, 10**6, 101)):
        try:
            with stopped_after(n_lines, *MODULES):
                apply_prodial(model, config)
            break
        except Stop:
            stops += 1
        assert snapshot(model) == before, n_lines
        assert [type(module) for module in model.modules()] == types
        assert [parameter.dtype for parameter in model.parameters()] == dtypes
    assert stops > 10
    remove_prodial(model)
    assert [type(module) for module in model.modules()] == types
    assert [parameter.dtype for parameter in model.parameters()] == dtypes


def test_remove_leaves_the_model_adapted() -> None:
    model = Toy().to(torch.bfloat16)
    apply_prodial(model, ProdialConfig(r=2, modules_to_save=("norm",)))
    randomise_adapters(model)
    before, logits = snapshot(model), model(toy_ids())
    stops = 0
    for n_lines in range(1, 10**6, 23):
        try:
            with stopped_after(n_lines, *MODULES):
                remove_prodial(model)
            break
        except Stop:
            stops += 1
        assert snapshot(model) == before, n_lines
        assert torch.equal(model(toy_ids()), logits)
    assert stops > 10
    assert not any(isinstance(module, ProdialLinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("again", [merge_prodial, lambda model: merge_quantized(model, "int8")])
def test_a_merge_is_finished_by_the_next_one(
    again: Callable[[nn.Module], object], tmp_path: Path
) -> None:
    for n_layers in (0, 1, 3):
        model = Toy()
        apply_prodial(model, CONFIG)
        randomise_adapters(model)
        logits = model(toy_ids())
        merged = 0

        def place(*arguments: Any, n_layers: int = n_layers, real: Any = module_tree.place) -> None:
            nonlocal merged
            if merged == n_layers:
                raise Stop
            merged += 1
            real(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module_tree, "place", place)
            with pytest.raises(Stop):
                again(model)
        # Not taken for a whole adapter meanwhile.
        with pytest.raises(
            ValueError, match=r"was stopped half way.*call merge_\w+\(model\) again"
        ):
            remove_prodial(model)
        with pytest.raises(AdapterError, match="was stopped half way"):
            save_adapter(model, tmp_path)
        again(model)
        assert not any(isinstance(module, ProdialLinear) for module in model.modules())
        torch.testing.assert_close(model(toy_ids()), logits, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("merge", [merge_prodial, lambda model: merge_quantized(model, "nf4")])
def test_a_merge_that_is_not_finite_changes_nothing(value: float, merge: Any) -> None:
    model = Toy()
    apply_prodial(model, EVERYTHING)
    with torch.no_grad():
        model.blocks[2].out_proj.prodial_b[0, 0] = value
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"blocks\.2\.out_proj: the merged weight would not be fin"
    ):
        merge(model)
    assert snapshot(model) == before


def test_a_merge_that_overflows_in_16_bits_changes_nothing() -> None:
    model = Toy().half()
    apply_prodial(model, CONFIG)
    with torch.no_grad():
        model.blocks[0].in_proj.prodial_scale.fill_(1e6)
    with pytest.raises(ValueError, match=r"blocks\.0\.in_proj: .* in torch\.float16.*overflow"):
        merge_prodial(model)
    assert isinstance(model.blocks[0].in_proj, ProdialLinear)


def test_a_mixer_that_fails_leaves_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mamba2")
    before = snapshot(model)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inject, "adapt_mixers", fail)
    with pytest.raises(KeyboardInterrupt):
        apply_prodial(model, ProdialConfig(r=2))
    assert snapshot(model) == before
    monkeypatch.undo()
    apply_prodial(model, ProdialConfig(r=2))
    model(input_ids=token_ids(), use_cache=False)
    remove_prodial(model)
    assert snapshot(model) == before
