"""The models that several processes measure together, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.training.random_weights import random_quantized
from prodial_kernels import ProdialConfig

LR = 1e-5
CONFIG = ProdialConfig(r=16)
_SSD = {"hidden_size": 768, "chunk_size": 256, "n_groups": 1, "vocab_size": 4096}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", {"hidden_size": 768, "num_hidden_layers": 4, "vocab_size": 4096}),
    "mamba2": (
        "Mamba2",
        {**_SSD, "num_hidden_layers": 4, "num_heads": 24, "head_dim": 64, "state_size": 128},
    ),
    "nemotron_h": (
        "NemotronH",
        {
            **_SSD, "num_hidden_layers": 4, "num_attention_heads": 12, "num_key_value_heads": 4,
            "head_dim": 64, "mamba_num_heads": 24, "mamba_head_dim": 64, "ssm_state_size": 128,
            "intermediate_size": 2048, "layers_block_type": ["mamba", "mlp", "mamba", "attention"],
        },
    ),
}  # fmt: skip
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": (
        "Mamba2",
        {
            "hidden_size": 32, "chunk_size": 8, "n_groups": 1, "vocab_size": 64, "num_heads": 8,
            "head_dim": 8, "state_size": 8, "num_hidden_layers": 4,
        },
    ),
}  # fmt: skip
# nvidia/Nemotron-H-8B-Base-8K: 24 Mamba-2, 24 MLP and 4 attention layers.
_PATTERN = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
_KINDS = {"M": "mamba", "-": "mlp", "*": "attention"}
LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba-1.4b": ("Mamba", {"hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 50280}),
    "nemotron-h-8b": (
        "NemotronH",
        {
            "hidden_size": 4096, "vocab_size": 131072, "intermediate_size": 21504,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "mamba_num_heads": 128, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8,
            "chunk_size": 128, "num_hidden_layers": len(_PATTERN),
            "layers_block_type": [_KINDS[kind] for kind in _PATTERN],
        },
    ),
}  # fmt: skip


class NoSignals:
    """Of a measurement nobody asks to stop."""

    noted: int | None = None

    def agree(self) -> None:
        """Nothing to agree on."""


def random_model(
    prefix: str, options: dict[str, Any], device: torch.device, dtype: torch.dtype,
    quantize: str | None,
) -> Any:  # fmt: skip
    """A model of transformers with random weights, the same in every process."""
    import transformers

    # The adapter's first values come from here too.
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(
        **options, pad_token_id=0, bos_token_id=0, eos_token_id=0
    )
    return random_quantized(config, device, dtype, quantize)[0]


def named_trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What trains, by name."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def trained_of(model: nn.Module) -> list[nn.Parameter]:
    """What trains."""
    return [parameter for _, parameter in named_trained(model)]
