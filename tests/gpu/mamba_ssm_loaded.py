"""mamba_ssm, loaded for the tests on a device, and how its mixers and models are adapted there."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from models import randomise_adapters
from torch import nn

from prodial_kernels import ProdialConfig, apply_prodial

if torch.cuda.is_available():
    # One launch configuration per kernel of Mamba-2 instead of minutes of tuning. Read at import.
    os.environ.setdefault("MAMBA_DETERMINISTIC", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mamba_ssm  # noqa: F401

MARKS = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("weight_is_not_read"),
    # Of mamba_ssm's own use of torch and Triton.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
WIDTH = 256
CONFIG = ProdialConfig(r=16, block_size={"in_proj": 4, "out_proj": 8})


def adapt(model: nn.Module, config: ProdialConfig) -> nn.Module:
    """Give a model adapters that are not at rest, the same on every device."""
    apply_prodial(model, config)
    model.cpu()
    randomise_adapters(model)
    return model.cuda()
