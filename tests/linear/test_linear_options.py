"""Options of a ``ProdialLinear`` that are of the wrong kind or out of range are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from prodial_kernels import ProdialConfig, ProdialLinear


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train_scale": "no"}, TypeError, "train_scale must be true or false, got 'no'"),
        ({"train_diagonal": 0}, TypeError, "train_diagonal must be true or false, got 0"),
        ({"n_blocks": True}, TypeError, "n_blocks must be an integer, got True"),
        ({"block_size": 2.0}, TypeError, r"block_size must be an integer, got 2\.0"),
        ({"r": True}, TypeError, "r must be an integer, got True"),
        ({"r": "4"}, TypeError, "r must be an integer, got '4'"),
        ({"r": -1}, ValueError, r"r must be >= 0 \(0 switches the LoRA part off\), got -1"),
        ({"lora_alpha": "1"}, TypeError, "lora_alpha must be a number, got '1'"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha must be a finite number .* got nan"),
        ({"lora_alpha": float("inf")}, ValueError, "lora_alpha must be a finite number .* got inf"),
        ({"lora_alpha": 1e308}, ValueError, r"lora_alpha must be a finite number .*1e\+308"),
        ({"lora_dropout": "0.1"}, TypeError, "lora_dropout must be a number, got '0.1'"),
        ({"adapter_dtype": torch.float8_e4m3fn}, TypeError, "adapter_dtype must be a dtype to tr"),
        ({"adapter_dtype": torch.int8}, TypeError, "adapter_dtype must be .* got torch.int8"),
        ({"adapter_dtype": torch.complex64}, TypeError, "adapter_dtype must be .* torch.complex64"),
    ],
)  # fmt: skip
def test_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    linear = nn.Linear(4, 4)
    with pytest.raises(error, match=message):
        ProdialLinear.from_linear(linear, **options)
    assert linear.weight.requires_grad


@pytest.mark.filterwarnings("ignore:Lazy modules|Initializing zero-element")
@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (lambda: nn.LazyLinear(4), TypeError, "have its weight already, got a LazyLinear .* run"),
        (lambda: nn.Linear(0, 4), ValueError, "one feature in and out, got in_features=0, out_fea"),
        (lambda: nn.Linear(4, 0), ValueError, "one feature in and out, got in_features=4, out_fea"),
        (lambda: nn.Conv1d(4, 4, 1), TypeError, r"must be an nn\.Linear, got Conv1d"),
    ],
)  # fmt: skip
def test_layers(layer: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ProdialLinear.from_linear(layer())


@pytest.mark.parametrize("r", [1, 4, 16])
def test_one_default_of_alpha(r: int) -> None:
    layer = ProdialLinear.from_linear(nn.Linear(4, 4), r=r)
    assert layer.lora_scaling == 1.0
    assert layer.lora_alpha == ProdialConfig(r=r).lora_alpha
