"""LoRA, DoRA and OFT as PEFT runs them: fp32 adapters under autocast, its defaults."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.projector.rivals.layer import Layer
from benchmarks.projector.rivals.methods import dora_magnitude, oft_block, oft_skew
from prodial_kernels.testing import LinearCase


class _OneProjector(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        n, k = weight.shape
        self.proj: Any = nn.Linear(k, n, bias=False, device="meta")
        self.proj.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y


def lora(case: LinearCase) -> Layer:
    """``LoraConfig`` with the case's rank."""
    from peft import LoraConfig

    return _lora(case, LoraConfig)


def dora(case: LinearCase) -> Layer:
    """``LoraConfig(use_dora=True)``."""
    from peft import LoraConfig

    return _lora(case, LoraConfig, use_dora=True)


def oft(case: LinearCase) -> Layer:
    """``OFTConfig`` with its default block size."""
    from peft import OFTConfig, inject_adapter_in_model

    model = _OneProjector(case.weight)
    config = OFTConfig(target_modules=["proj"], oft_block_size=oft_block(case))
    inject_adapter_in_model(config, model)
    model.to(case.x.device)
    parameter = model.proj.oft_R["default"].weight
    parameter.data = oft_skew(case)
    return Layer(_autocast(model, case), {"skew": parameter})


def _lora(case: LinearCase, config: Any, **options: Any) -> Layer:
    from peft import inject_adapter_in_model

    if case.lora_a is None or case.lora_b is None:
        raise ValueError("case: PEFT's LoRA needs lora_a and lora_b")
    r = case.lora_a.shape[0]
    model = _OneProjector(case.weight)
    inject_adapter_in_model(
        config(r=r, lora_alpha=case.lora_scaling * r, target_modules=["proj"], **options), model
    )
    model.to(case.x.device)
    trained = {
        "lora_a": model.proj.lora_A["default"].weight,
        "lora_b": model.proj.lora_B["default"].weight,
    }
    values = {"lora_a": case.lora_a, "lora_b": case.lora_b}
    if options.get("use_dora"):
        trained["magnitude"] = model.proj.lora_magnitude_vector["default"].weight
        values["magnitude"] = dora_magnitude(case)
    for name, parameter in trained.items():
        parameter.data = values[name].detach().clone()
    return Layer(_autocast(model, case), trained)


def _autocast(model: nn.Module, case: LinearCase) -> Any:
    def context() -> AbstractContextManager[Any]:
        if case.x.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(case.x.device.type, case.x.dtype)

    def forward(x: Tensor) -> Tensor:
        with context():
            y: Tensor = model(x)
        return y

    return forward
