"""Which loss is taken: an unknown one, and liger-kernel's."""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prodial_kernels.models.layers.head import find_head
from prodial_kernels.training.step.loss import FullLoss, LossError, choose_loss
from support.loss_cases import HeadOnly, labels_of, run
from support.models import FAMILIES

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="'auto', 'chunked', 'liger', 'full', got 'fast'"):
        choose_loss("fast", CPU)


def test_liger_needs_cuda() -> None:
    with pytest.raises(LossError, match="it needs a CUDA device"):
        choose_loss("liger", CPU)


def test_liger_is_taken_where_it_is_installed_and_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert choose_loss("auto", CUDA)[0] == "chunked"
    with pytest.raises(LossError, match="not installed: pip install liger-kernel"):
        choose_loss("liger", CUDA)
    found = types.ModuleType("liger_kernel")
    found.__spec__ = ModuleSpec("liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel", found)
    assert choose_loss("auto", CUDA) == ("liger", "liger-kernel is installed")
    assert choose_loss("auto", CUDA, graphed=True)[0] == "chunked"
    assert choose_loss("auto", CPU)[0] == "chunked"
    with pytest.raises(LossError, match="waits for the device; use 'chunked'"):
        choose_loss("liger", CUDA, graphed=True)


def test_liger_is_called_with_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    class LigerFusedLinearCrossEntropyLoss(nn.Module):
        def __init__(self, ignore_index: int, reduction: str) -> None:
            super().__init__()
            self.options = {"ignore_index": ignore_index, "reduction": reduction}

        def forward(self, lin_weight: Any, _input: Any, target: Any, bias: Any = None) -> Tensor:
            logits = functional.linear(_input, lin_weight, bias)
            return functional.cross_entropy(logits.float(), target, **self.options)

    name = "liger_kernel.transformers.fused_linear_cross_entropy"
    for path in ("liger_kernel", "liger_kernel.transformers", name):
        monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    sys.modules[name].LigerFusedLinearCrossEntropyLoss = LigerFusedLinearCrossEntropyLoss  # type: ignore[attr-defined]
    from prodial_kernels.training.step.loss import LigerLoss

    model = HeadOnly(torch.randn(2, 9, 8), torch.randn(50, 8), torch.randn(50), 0.37)
    labels = labels_of(2, 9, 50)
    result = run(LigerLoss(find_head(model)), model, labels)
    expected = run(FullLoss(model), model, labels)
    for key, value in result.items():
        torch.testing.assert_close(value, expected[key])


def test_liger_patches_one_of_the_families() -> None:
    """Which is why its loss is called by itself; where this fails, it has learnt another."""
    patches = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    assert set(patches.MODEL_TYPE_TO_APPLY_LIGER_FN) & set(FAMILIES) == {"falcon_h1"}
