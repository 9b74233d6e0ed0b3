"""MambaPEFT's methods in mamba_ssm's Mamba on the real kernels, against their definitions in fp64.

The exact values are those of the CPU stand-in's sequential scan on the parameters that each
method's definition gives (``support/mixers/method_oracle.py``).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import (
    AdditionalScan,
    Lora,
    ParallelAdapter,
    PartialLora,
    PartialTuning,
    ProdialConfig,
    ProdialLinear,
    apply_methods,
)
from prodial_kernels.testing import assert_all_accurate
from support.mamba_ssm_loaded import MARKS, WIDTH, language_model, token_ids
from support.mixers import mamba_ssm_stand_ins as stand_ins
from support.mixers.method_oracle import Oracle, move

pytestmark = MARKS[:1] + MARKS[2:]

LISTS: dict[str, list[Any]] = {
    "lora": [Lora(("in_proj", "out_proj", "x_proj", "dt_proj"), r=16)],
    "partial-lora": [PartialLora(("X", "Z", "d", "B", "C"), r=8)],
    "parallel-adapter": [ParallelAdapter(r=16)],
    "partial-tuning": [PartialTuning(("A_log", "D", "dt_bias", "conv1d", "conv1d_bias"))],
    "additional-scan": [AdditionalScan(6)],
    "additional-scan-prefix": [AdditionalScan(4, "prefix", "s4d")],
    "together": [
        ProdialConfig(r=16, block_size={"in_proj": 4, "out_proj": 8}),
        PartialLora(("X", "C"), r=8), AdditionalScan(2), PartialTuning(("A_log", "conv1d")),
        ParallelAdapter(r=8),
    ],
}  # fmt: skip


class Block(nn.Module):
    """One mixer; exact, it runs the stand-in's forward."""

    def __init__(self, exact: bool = False) -> None:
        from mamba_ssm import Mamba

        super().__init__()
        torch.manual_seed(0)
        self.mixer = Mamba(WIDTH, device="cuda", dtype=torch.bfloat16)
        self.exact = exact

    def forward(self, x: Tensor) -> Tensor:
        if self.exact:
            return stand_ins.Mamba.forward(self.mixer, x)
        made: Tensor = self.mixer(x)
        return made


def gradients(block: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    named = {n: p for n, p in block.named_parameters() if p.requires_grad}
    y = block(x)
    found = torch.autograd.grad(y, list(named.values()), grad)
    return {"y": y.detach(), **dict(zip(named, found, strict=True))}


@pytest.mark.parametrize("name", LISTS)
def test_outputs_and_gradients_keep_the_budget(name: str) -> None:
    block = Block()
    apply_methods(block, LISTS[name])
    move(block.cpu(), spread=0.05)
    block.cuda()
    generator = torch.Generator("cuda").manual_seed(1)
    x, grad = torch.randn(2, 2, 129, WIDTH, device="cuda", generator=generator).bfloat16()
    got = gradients(block, x, grad)
    eager = copy.deepcopy(block)
    eager.mixer.use_fast_path = False
    for layer in eager.modules():
        if isinstance(layer, ProdialLinear):
            layer.impl = "reference"
    oracle = Oracle(Block(exact=True), block, LISTS[name])
    outputs: list[Tensor] = []

    def call(model: nn.Module) -> Tensor:
        outputs.append(model(x.double()))
        return (outputs[0] * grad.double()).sum()

    exact = oracle.run(call)
    del exact["result"]
    exact["y"] = outputs[0].detach()
    for values in (got, expected := gradients(eager, x, grad)):
        assert {n.replace("base_layer.", "") for n in values} == exact.keys()
    assert_all_accurate(
        {n.replace("base_layer.", ""): v for n, v in got.items()},
        {n.replace("base_layer.", ""): v for n, v in expected.items()},
        exact, torch.bfloat16,
    )  # fmt: skip


def test_generation_with_more_states_equals_one_forward() -> None:
    from mamba_ssm.utils.generation import InferenceParams

    model = language_model("Mamba1", config=ProdialConfig(target_modules=("in_proj", "out_proj")))
    from prodial_kernels import remove_prodial

    remove_prodial(model)
    apply_methods(model, [AdditionalScan(4), Lora(("x_proj", "embed"), r=4), ParallelAdapter(r=4)])
    move(model.cpu(), spread=0.05)
    model.cuda().eval()
    ids = token_ids()
    with torch.no_grad():
        whole = model(ids).logits
        params = InferenceParams(max_seqlen=ids.shape[1], max_batch_size=len(ids))
        parts = [model(ids[:, :3], inference_params=params).logits]
        for position in range(3, ids.shape[1]):
            params.seqlen_offset = position
            parts.append(model(ids[:, position : position + 1], inference_params=params).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-3, atol=1e-3)
