"""What PEFT's real LoRA does in a model, beside what the doctor says of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners import tuners_utils
from torch import nn

from prodial_kernels.models.diagnosis.doctor import diagnose
from prodial_kernels.module_tree import module_paths
from support.models import token_ids


def said(model: nn.Module) -> dict[str, str]:
    """The doctor's status of every linear layer but the head, by its path."""
    statuses = {}
    for module, paths in module_paths(model).items():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            path = paths[0]
            (finding,) = diagnose(model, path.replace(".", r"\.")).findings
            statuses[path] = finding.status
    return statuses


def live_loras(model: nn.Module, targets: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Whether B of PEFT's LoRA gets a gradient in a training step, by the layer's path."""
    # Without it, the layers that it refuses could not be looked at.
    monkeypatch.setattr(tuners_utils, "_check_lora_target_modules_mamba", lambda *_: None)
    config = LoraConfig(r=2, target_modules=targets, lora_dropout=0.0)
    peft_model = get_peft_model(copy.deepcopy(model), config).train()
    output = peft_model(
        input_ids=token_ids().to(model.device), labels=token_ids().to(model.device), use_cache=False
    )
    output.loss.backward()
    grads = {
        name.removeprefix("base_model.model.").partition(".lora_B.")[0]: parameter.grad
        for name, parameter in peft_model.named_parameters()
        if ".lora_B." in name
    }
    return {path: grad is not None and bool(grad.count_nonzero()) for path, grad in grads.items()}
