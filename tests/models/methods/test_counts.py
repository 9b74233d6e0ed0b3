"""How many parameters the methods train at published sizes.

Of the papers at hand ProDiaL's prints counts for baselines (Tables 3 and 4: "printed" below, with a
classifier of 102 or 196 classes in vision). MambaPEFT's settings are those of its released
configurations (sony/MambaPEFT 87f21ec), counted by hand from what that code builds.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from prodial_kernels import (
    AdditionalScan,
    AffixTuning,
    BitFit,
    Full,
    LinearProbe,
    Lora,
    ParallelAdapter,
    PartialLora,
    PartialTuning,
    PromptTuning,
    VisionMamba,
)
from prodial_kernels.models.methods.baselines import trained_as_they_are
from prodial_kernels.models.methods.planning import plan_methods, planned_shapes


@cache
def plain(name: str, classes: int = 102) -> nn.Module:
    """A published size, without values."""
    with torch.device("meta"):
        if name != "mamba-130m":
            return VisionMamba.from_size(name, num_classes=classes)
        from transformers import MambaConfig, MambaForCausalLM

        sizes = {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50280}
        return MambaForCausalLM(MambaConfig(**sizes))


def count(model: nn.Module, methods: list[Any]) -> int:
    shapes = planned_shapes(plan_methods(model, methods))
    own = {id(p): p for method in methods for p in trained_as_they_are(model, method)}
    added = sum(torch.Size(shape).numel() for shape in shapes.values())
    return added + sum(parameter.numel() for parameter in own.values())


PROJECTORS = Lora(("in_proj", "out_proj"))
STRONG = Lora(("in_proj", "out_proj", "x_proj"))
HEAD = LinearProbe(("head",))


@pytest.mark.parametrize(
    ("model", "classes", "methods", "printed"),
    [
        ("mamba-130m", 0, [BitFit()], "0.07M"),
        ("mamba-130m", 0, [STRONG, Lora(("embed",))], "3.80M"),
        ("mamba-130m", 0, [PROJECTORS], "2.36M"),
        ("tiny", 102, [Full()], "6.97M"),
        ("tiny", 102, [HEAD], "0.02M"),
        ("tiny", 196, [HEAD], "0.04M"),
        ("tiny", 102, [BitFit(), LinearProbe(("head",))], "0.06M"),
        ("tiny", 102, [STRONG, HEAD], "0.94M"),
        ("tiny", 196, [STRONG, HEAD], "0.96M"),
        ("tiny", 102, [PROJECTORS, HEAD], "0.61M"),
        ("tiny", 196, [PROJECTORS, HEAD], "0.63M"),
        ("tiny", 102, [Lora(("in_proj",)), HEAD], "0.39M"),
        ("tiny", 196, [Lora(("in_proj",)), HEAD], "0.41M"),
        ("tiny", 102, [Lora(("out_proj",)), HEAD], "0.24M"),
        ("tiny", 196, [Lora(("out_proj",)), HEAD], "0.26M"),
        ("small", 102, [Full()], "25.45M"),
        ("small", 102, [BitFit(), HEAD], "0.11M"),
        ("small", 102, [STRONG, HEAD], "1.85M"),
        ("small", 102, [PROJECTORS, HEAD], "1.22M"),
        ("small", 102, [Lora(("out_proj",)), HEAD], "0.48M"),
    ],
)
def test_printed(model: str, classes: int, methods: list[Any], printed: str) -> None:
    """The rank is 16 throughout; the patch embedding of Vim is not among what "Strong" trains."""
    assert f"{count(plain(model, classes), methods) / 1e6:.2f}M" == printed


@pytest.mark.parametrize(
    ("model", "classes", "methods", "printed", "found"),
    [
        ("mamba-130m", 0, [Lora(("in_proj",))], "1.48M", "1.47M"),
        ("mamba-130m", 0, [Lora(("out_proj",))], "0.89M", "0.88M"),
        ("tiny", 196, [BitFit(), HEAD], "0.08M", "0.07M"),
        ("small", 102, [Lora(("in_proj",)), HEAD], "0.88M", "0.78M"),
    ],
)
def test_printed_and_not_followed(
    model: str, classes: int, methods: list[Any], printed: str, found: str
) -> None:
    """No rank gives what is printed: the first three are a rounding off, the last a digit."""
    assert f"{count(plain(model, classes), methods) / 1e6:.2f}M" == found != printed


# d = 384, E = 768, R = 24, N = 16; 24 layers of two directions.
VIM_SMALL = {
    "lora_in_proj_32": ([Lora(("in_proj",), r=32)], 24 * 32 * (384 + 1536)),
    "lora_out_proj_96": ([Lora(("out_proj",), r=96)], 24 * 96 * (768 + 384)),
    "lora_x_proj_dim64": ([Lora(("x_proj",), r=64)], 48 * 64 * (768 + 56)),
    "lora_dt_dim64": ([Lora(("dt_proj",), r=64)], 48 * 64 * (24 + 768)),
    "lora_patch_embed": ([Lora(("embed",), r=32)], 32 * (3 * 16 * 16 + 384)),
    "lorap_X_64": ([PartialLora(("X",), r=64)], 24 * 64 * (384 + 768)),
    "lorap_Z_64": ([PartialLora(("Z",), r=64)], 24 * 64 * (384 + 768)),
    "lorap_d_dim64": ([PartialLora(("d",), r=64)], 48 * 64 * (768 + 24)),
    "lorap_B_dim64": ([PartialLora(("B",), r=64)], 48 * 64 * (768 + 16)),
    "lorap_C_dim64": ([PartialLora(("C",), r=64)], 48 * 64 * (768 + 16)),
    "adaptf_32": ([ParallelAdapter(r=32)], 24 * 32 * (768 + 384)),
    "prompt_prefixsuffix_8": (
        [PromptTuning(8, mlp=True)],
        8 * 384 + 2 * (384 * 384 + 384),
    ),
    "prompt_prefixsuffix_8_wo_project": ([PromptTuning(8)], 8 * 384),
    "affixtune_prefix3dual": (
        [AffixTuning(3, mlp=True)],
        3 * 1536 + 1536 * 1536 + 1536 + (1536 + 1) * 24 * 2 * 1536,
    ),
    "affixtune_prefix3dual_wo_project": ([AffixTuning(3)], 3 * 24 * 2 * 1536),
    "addiscan_prefix_6": ([AdditionalScan(6, "prefix")], 48 * (768 * 6 + 12 * 768)),
    "learnable_A": ([PartialTuning(("A_log",))], 48 * 768 * 16),
    "learnable_D": ([PartialTuning(("D",))], 48 * 768),
    "learnable_conv1d": ([PartialTuning(("conv1d",))], 48 * 768 * 4),
    "learnable_bias": ([PartialTuning(("dt_bias",))], 48 * 768),
}


@pytest.mark.parametrize("name", VIM_SMALL)
def test_released_settings_of_vim_small(name: str) -> None:
    methods, expected = VIM_SMALL[name]
    assert count(plain("small"), methods) == expected


# d = 768, E = 1536, N = 16; 24 layers.
LANGUAGE = {
    "lora_X": ([PartialLora(("X",), r=64)], 24 * 64 * (768 + 1536)),
    "AddiScan": ([AdditionalScan(6, "prefix")], 24 * (1536 * 6 + 12 * 1536)),
    "AffixTuning": ([AffixTuning(1)], 24 * 3072),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_released_settings_of_mamba_130m(name: str) -> None:
    methods, expected = LANGUAGE[name]
    assert count(plain("mamba-130m"), methods) == expected
