"""A model that is adapted on the CPU begins as one that is adapted on the GPU."""

from __future__ import annotations

import pytest
import torch

from prodial_kernels import ParallelAdapter, ProdialConfig, apply_methods
from prodial_kernels.training.start.drawing import DrawnOn
from support.models import build


@pytest.mark.gpu
def test_values_are_those_of_the_device() -> None:
    methods = [ProdialConfig(r=8), ParallelAdapter(r=8)]
    here, there = build("mamba"), build("mamba").cuda()
    torch.manual_seed(7)
    apply_methods(there, methods)
    torch.manual_seed(7)
    with DrawnOn(torch.device("cuda")):
        apply_methods(here, methods)
    expected = {name: p for name, p in there.named_parameters() if p.requires_grad}
    for name, p in here.named_parameters():
        assert not p.is_cuda
        if p.requires_grad:
            assert torch.equal(p, expected[name].cpu()), name
