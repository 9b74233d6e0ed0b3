"""mamba_ssm, loaded for the tests on a device, and how its mixers and models are adapted there."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import ProdialConfig, apply_prodial
from support.models import randomise_adapters

if torch.cuda.is_available():
    assert "TRITON_CACHE_AUTOTUNING" not in os.environ, (
        "unset TRITON_CACHE_AUTOTUNING: with it mamba_ssm 2.3.2 tunes for minutes in spite of "
        "MAMBA_DETERMINISTIC"
    )
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


def language_model(
    layer: str, dtype: torch.dtype = torch.float32, config: ProdialConfig = CONFIG, depth: int = 2
) -> nn.Module:
    from mamba_ssm import MambaLMHeadModel
    from mamba_ssm.models.config_mamba import MambaConfig

    torch.manual_seed(0)
    options = MambaConfig(d_model=WIDTH, n_layer=depth, vocab_size=512, ssm_cfg={"layer": layer})
    model = MambaLMHeadModel(options, device="cuda", dtype=dtype)
    return adapt(model, config)


def token_ids(batch: int = 2, length: int = 19) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 512, (batch, length), generator=generator).cuda()
