"""Tiny models whose mixers are no Mamba's: gated delta nets, short convolutions and the like."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 48}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_PLAIN = {**_SIZES, **_TOKENS, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
_LATENT = {
    **_SIZES, **_TOKENS, "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 8, "num_local_experts": 2,
    "num_experts_per_tok": 1, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_DELTA = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
_EXPERTS = {
    "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}  # fmt: skip
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}

_KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("Lfm2", {**_PLAIN, **_CONVOLUTION, "block_auto_adjust_ff_dim": False}),
    "lfm2_moe": (
        "Lfm2Moe",
        {
            **_PLAIN, **_CONVOLUTION, "num_dense_layers": 1, "num_experts": 2,
            "num_experts_per_tok": 1, "moe_intermediate_size": 24,
        },
    ),
    "lfm3": ("Lfm3", {**_PLAIN, **_CONVOLUTION}),
    "qwen3_next": ("Qwen3Next", {**_PLAIN, **_DELTA, **_EXPERTS}),
    "qwen3_5_text": ("Qwen3_5Text", {**_PLAIN, **_DELTA}),
    "qwen3_5_moe_text": ("Qwen3_5MoeText", {**_PLAIN, **_DELTA, **_EXPERTS}),
    "lara_mini": ("LaraMini", {**_PLAIN, **_DELTA}),
    "olmo_hybrid": ("OlmoHybrid", {**_PLAIN, **_DELTA}),
    "kimi_linear": (
        "KimiLinear", {**_LATENT, **_LINEAR, "linear_head_dim": 8, "linear_num_heads": 2},
    ),
    "bailing_hybrid": ("BailingHybrid", {**_LATENT, **_LINEAR, "head_dim": 8}),
    "recurrent_gemma": (
        "RecurrentGemma",
        {
            **_PLAIN, "lru_width": 32, "block_types": ["recurrent", "attention"],
            "attention_window_size": 16,
        },
    ),
}  # fmt: skip
OTHERS = {
    name: entry for name, entry in _KNOWN.items() if hasattr(transformers, f"{entry[0]}Config")
}
"""Those that the installed transformers has: class prefix and options."""


def build_other(name: str, **overrides: Any) -> nn.Module:
    """Return a tiny causal language model of ``OTHERS``, in training mode."""
    prefix, options = OTHERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**options, **overrides})
    cls = getattr(transformers, f"{prefix.removesuffix('Text')}ForCausalLM")
    model: nn.Module = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()
