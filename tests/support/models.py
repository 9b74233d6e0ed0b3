"""Tiny models for tests: every Mamba family of transformers, and adapters that are not at rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prodial_kernels import ProdialLinear
from prodial_kernels.models.mixers.arguments import is_cache

_VOCABULARY = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_SIZES = {"hidden_size": 16, "num_hidden_layers": 2}
_HYBRID = {"hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 24}
_ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1}
_SSD = {
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 4,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}


@dataclass(frozen=True)
class Family:
    """A Mamba family of transformers.

    Attributes:
        prefix: Of its class names, as in ``{prefix}Config``.
        options: Of a tiny configuration with at least two Mamba layers.
        fused: Name of the fused training function that its mixers call; None if they call none.
    """

    prefix: str
    options: dict[str, Any]
    fused: str | None


_S6, _SSD_FUSED = "mamba_inner_fn", "mamba2_split_conv1d_scan_combined"

FAMILIES: dict[str, Family] = {
    "mamba": Family("Mamba", {**_SIZES, "state_size": 4, "use_bias": True}, _S6),
    "falcon_mamba": Family("FalconMamba", {**_SIZES, "state_size": 4}, _S6),
    "mamba2": Family(
        "Mamba2",
        {**_SIZES, "state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
        _SSD_FUSED,
    ),
    "jamba": Family(
        "Jamba",
        {
            **_HYBRID,
            **_ATTENTION,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 2,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
        },
        None,
    ),
    "bamba": Family(
        "Bamba",
        {**_HYBRID, **_ATTENTION, **_SSD, "attn_layer_indices": [1], "mamba_proj_bias": True},
        _SSD_FUSED,
    ),
    "zamba": Family(
        "Zamba",
        {
            **_HYBRID,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "mamba_d_state": 4,
            "mamba_dt_rank": 2,
            "n_mamba_heads": 2,
            "layers_block_type": ["mamba", "hybrid", "hybrid"],
        },
        None,
    ),
    "zamba2": Family(
        "Zamba2",
        {
            **_HYBRID,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "mamba_d_state": 4,
            "n_mamba_heads": 4,
            "mamba_ngroups": 1,
            "chunk_size": 4,
            "hybrid_layer_ids": [1],
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "num_mem_blocks": 1,
        },
        _SSD_FUSED,
    ),
    "falcon_h1": Family(
        "FalconH1",
        {**_SIZES, **_ATTENTION, **_SSD, "intermediate_size": 24, "mamba_d_ssm": 32, "head_dim": 8},
        _SSD_FUSED,
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybrid",
        {
            **_HYBRID,
            **_ATTENTION,
            **_SSD,
            "layer_types": ["mamba", "attention", "mamba"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "shared_intermediate_size": 24,
        },
        _SSD_FUSED,
    ),
    "nemotron_h": Family(
        "NemotronH",
        {
            **_HYBRID,
            **_ATTENTION,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 4,
            "n_groups": 1,
            "chunk_size": 4,
            "layers_block_type": ["mamba", "attention", "mamba", "moe"],
            "n_routed_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
        },
        _SSD_FUSED,
    ),
}

FUSED_FAMILIES = [name for name, family in FAMILIES.items() if family.fused]


def build(name: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """Return a tiny causal language model of a family, in training mode."""
    import transformers

    family = FAMILIES[name]
    torch.manual_seed(seed)
    options = {**_VOCABULARY, **family.options, **overrides}
    config = getattr(transformers, f"{family.prefix}Config")(**options)
    model: nn.Module = getattr(transformers, f"{family.prefix}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # The default initialisation leaves many tensors too small, or equal to 0 or 1, to show
            # a mistake.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def token_ids(batch: int = 2, length: int = 7, seed: int = 1) -> Tensor:
    """Return ordinary token ids, [batch, length], int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, _VOCABULARY["vocab_size"], (batch, length), generator=generator)


@torch.no_grad()
def randomise_adapters(model: nn.Module, seed: int = 2) -> None:
    """Move every adapter away from its initial values (B = 0 would hide A)."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, ProdialLinear):
            for _, parameter in layer.adapter_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@dataclass
class Step:
    """One training step: logits [batch, length, vocabulary] and gradients by parameter name."""

    logits: Tensor
    gradients: dict[str, Tensor | None] = field(default_factory=dict)


def decoded(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [batch, length, vocabulary] token by token, with a cache by the release's name."""
    cache: dict[str, Any] = {}
    logits = []
    for token in ids.split(1, dim=1):
        output = model.eval()(input_ids=token, use_cache=True, **cache)
        cache = {name: value for name, value in output.items() if is_cache(name, value)}
        assert len(cache) == 1
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def training_step(model: nn.Module, ids: Tensor) -> Step:
    """Run forward and backward of the causal loss in training mode, without a cache."""
    model.train()
    model.zero_grad(set_to_none=True)
    output = model(input_ids=ids, labels=ids, use_cache=False)
    output.loss.backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return Step(output.logits.detach(), trained)
