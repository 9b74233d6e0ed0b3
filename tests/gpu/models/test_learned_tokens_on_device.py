"""Affix- and prompt-tuning on the real kernels: against fp64, and decoding against one forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import AffixTuning, ProdialConfig, PromptTuning, apply_methods, remove_prodial
from prodial_kernels.models.vision_mamba.mixer import BidirectionalMamba
from prodial_kernels.testing import assert_all_accurate
from support.mamba_ssm_loaded import MARKS, WIDTH, language_model, token_ids
from support.mixers.affix_oracle import affix_by_definition, own_tokens

pytestmark = MARKS[:1] + MARKS[2:]

METHODS = {
    "prefix": AffixTuning(3),
    "infix": AffixTuning(3, "infix"),
    "network": AffixTuning(3, mlp=True, hidden=64),
}


def mixer_model(directions: int) -> nn.Sequential:
    from mamba_ssm import Mamba

    torch.manual_seed(0)
    mixer = Mamba(WIDTH) if directions == 1 else BidirectionalMamba(WIDTH)
    return nn.Sequential(mixer).cuda().bfloat16()


def gradients(model: nn.Module, x: Tensor, y: Tensor, grad: Tensor) -> dict[str, Tensor]:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(y, [x, *named.values()], grad.to(y.dtype))
    return dict(zip(["y", "x", *named], [y.detach(), *found], strict=True))


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("length", [129, 125])
def test_outputs_and_gradients_keep_the_budget(name: str, directions: int, length: int) -> None:
    method, model = METHODS[name], mixer_model(directions)
    apply_methods(model, [method])
    generator = torch.Generator("cuda").manual_seed(1)
    x, grad = torch.randn(2, 2, length, WIDTH, device="cuda", generator=generator).bfloat16()
    x.requires_grad_()
    got = gradients(model, x, model(x), grad)

    eager = copy.deepcopy(model)
    # Upstream's separate kernels, and PyTorch's operators.
    eager[0].use_fast_path, eager[0].scan = False, "torch"
    given = x.detach().requires_grad_()
    expected = gradients(eager, given, eager(given), grad)

    plain = copy.deepcopy(model).double()
    given = x.detach().double().requires_grad_()
    tokens = own_tokens(plain, method.mlp)
    each = [tokens[0 if len(tokens) == 1 else d] for d in range(directions)]
    y = affix_by_definition(plain[0], given, each, method.position, directions)
    exact = gradients(plain, given, y, grad)
    assert_all_accurate(got, expected, exact, torch.bfloat16)


@pytest.mark.parametrize("method", [AffixTuning(3), PromptTuning(5)], ids=["affix", "prompt"])
def test_generation_equals_one_forward(method: Any) -> None:
    from mamba_ssm.utils.generation import InferenceParams

    model = language_model("Mamba1", config=ProdialConfig(target_modules=("in_proj", "out_proj")))
    remove_prodial(model)
    apply_methods(model, [method])
    model.eval()
    ids = token_ids()
    with torch.no_grad():
        whole = model(ids).logits
        params = InferenceParams(max_seqlen=ids.shape[1], max_batch_size=len(ids))
        parts = [model(ids[:, :3], inference_params=params).logits]
        for place in range(3, ids.shape[1]):
            params.seqlen_offset = place
            parts.append(model(ids[:, place : place + 1], inference_params=params).logits)
    assert whole.shape[1] == ids.shape[1]
    error = (torch.cat(parts, dim=1) - whole).norm() / whole.norm()
    assert error < 0.02
