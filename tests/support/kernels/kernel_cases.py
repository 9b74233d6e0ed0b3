"""Running a case through the kernels: any of its gradients, under a known mask, being watched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from prodial_kernels import prodial_linear
from prodial_kernels.kernels.projector import passes
from prodial_kernels.kernels.replay import recorded_calls
from prodial_kernels.testing import LinearCase, assert_all_accurate

# Drawn before every call whose mask has to be known.
MASK_SEED = 11


def triton_linear(case: LinearCase, **changes: Any) -> Tensor:
    """``case`` by the kernels; with ``lora_dropout``, under the mask of ``dropout_mask``."""
    if case.lora_dropout:
        torch.manual_seed(MASK_SEED)
    options = {
        "blocks": case.blocks, "scale": case.scale, "lora_a": case.lora_a, "lora_b": case.lora_b,
        "bias": case.bias, "lora_scaling": case.lora_scaling, "lora_dropout": case.lora_dropout,
        "training": True, "diagonal": case.diagonal, "impl": "triton", **changes,
    }  # fmt: skip
    return prodial_linear(case.x, case.weight, **options)


def gradients_of(
    case: LinearCase, function: Callable[[LinearCase], Tensor], trained: Sequence[str]
) -> dict[str, Tensor]:
    """Run forward and backward; return ``output`` and the gradients of ``trained`` alone."""
    leaves = {name: getattr(case, name).detach().requires_grad_() for name in trained}
    output = function(replace(case, **leaves))
    if not leaves:
        return {"output": output.detach()}
    found = torch.autograd.grad(output, list(leaves.values()), case.grad_output)
    named = dict(zip((f"d_{name}" for name in leaves), found, strict=True))
    return {"output": output.detach(), **named}


def assert_matches_fp64(
    case: LinearCase,
    *,
    compute: torch.dtype,
    trained: Sequence[str] | None = None,
    function: Callable[[LinearCase], Tensor] = triton_linear,
) -> None:
    """Apply the accuracy rule to the output and the gradients of ``trained`` (default: all)."""
    names = [name for name in LinearCase.TRAINED if getattr(case, name) is not None]
    names = [name for name in names if trained is None or name in trained]
    rounded = case.cast(compute, torch.float32)
    exact = gradients_of(rounded.cast(torch.float64, torch.float64), LinearCase.reference, names)
    eager = gradients_of(rounded, LinearCase.reference, names)
    result = gradients_of(rounded, function, names)
    assert_all_accurate(result, eager, exact, compute)


def dropout_mask(
    tokens: int, in_features: int, probability: float, *, device: str, dtype: torch.dtype
) -> Tensor:
    """The mask [tokens, in_features] that the kernels draw after ``MASK_SEED``, True for kept.

    With W = 0, A a slice of the identity and B = I the output is a slice of dropout(x).
    """
    width = 128
    x = torch.ones(tokens, in_features, device=device, dtype=dtype)
    identity = torch.eye(in_features, device=device)
    slices = []
    for start in range(0, in_features, width):
        lora_a = identity[start : start + width]
        r = lora_a.shape[0]
        torch.manual_seed(MASK_SEED)
        kept = prodial_linear(
            x, x.new_zeros(r, in_features), blocks=None, scale=None, lora_a=lora_a,
            lora_b=torch.eye(r, device=device), lora_dropout=probability, training=True,
            impl="triton",
        )  # fmt: skip
        slices.append(kept != 0)
    return torch.cat(slices, dim=1)


def watch(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, see: Callable[..., None]
) -> None:
    """Let ``see`` have the arguments of every call of a module's function, which goes on."""
    original = getattr(module, name)

    def watched(*args: Any, **options: Any) -> Any:
        see(*args, **options)
        return original(*args, **options)

    monkeypatch.setattr(module, name, watched)


def replan(
    monkeypatch: pytest.MonkeyPatch, direction: Literal["forward", "backward"], **changes: Any
) -> None:
    """Let every call of a direction run by its own plan with ``changes``."""
    choose = getattr(passes, f"choose_{direction}")
    monkeypatch.setattr(
        passes,
        f"choose_{direction}",
        lambda *args, **named: replace(choose(*args, **named), **changes),
    )
    recorded_calls.reset()


def run(case: LinearCase, impl: str = "triton") -> Tensor:
    return prodial_linear(
        case.x, case.weight, blocks=case.blocks, scale=case.scale, lora_a=case.lora_a,
        lora_b=case.lora_b, bias=case.bias, lora_scaling=case.lora_scaling,
        diagonal=case.diagonal, impl=impl,
    )  # fmt: skip
