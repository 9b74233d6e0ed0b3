"""The dimensions of the models that jobs train, as their makers publish them.

Checked on 2026-12-01 against copies of the makers' ``config.json`` in public tests and notes, which
the comments name, and by the number of parameters that they give, which is that of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """A model's dimensions, by transformers' ``model_type``, and a checkpoint that has them.

    Attributes:
        options: Of its configuration, beside width, layers and vocabulary.
    """

    family: str
    width: int
    layers: int
    vocabulary: int
    published: str
    options: Mapping[str, Any]


_MAMBA = {"state_size": 16, "tie_word_embeddings": True}
_FALCON_MAMBA = {"state_size": 16, "tie_word_embeddings": False}
_BLOCKS = {"M": "mamba", "-": "mlp", "E": "moe", "*": "attention"}


def _nemotron_h(pattern: str, **options: Any) -> dict[str, Any]:
    """A configuration whose blocks a pattern of NVIDIA's gives, such as ``"M-M*"``."""
    blocks = [_BLOCKS[letter] for letter in pattern]
    return {
        "layers_block_type": blocks, "ssm_state_size": 128, "n_groups": 8, "head_dim": 128,
        "tie_word_embeddings": False, "mlp_hidden_act": "relu2", **options,
    }  # fmt: skip


# Copied whole in JAX and Rust ports of the model; 31.6B parameters.
_NANO_30B = _nemotron_h(
    "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    mamba_num_heads=64, mamba_head_dim=64, num_attention_heads=32, num_key_value_heads=2,
    intermediate_size=1856, moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712,
    n_routed_experts=128, num_experts_per_tok=6, routed_scaling_factor=2.5,
)  # fmt: skip
# In vLLM-style metadata tests of ports; 3,973,556,832 parameters, the published number.
_NANO_4B = _nemotron_h(
    "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-",
    mamba_num_heads=96, mamba_head_dim=80, num_attention_heads=40, num_key_value_heads=8,
    intermediate_size=12544,
)  # fmt: skip
# The defaults of NVIDIA's own configuration_nemotron_h.py; also Megatron-Bridge's
# docs/models/llm/nemotronh.md; 8.1B parameters.
_NEMOTRON_8B = _nemotron_h(
    "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    mamba_num_heads=128, mamba_head_dim=64, num_attention_heads=32, num_key_value_heads=8,
    intermediate_size=21504,
)  # fmt: skip
# A config.json held by tests of an MLX port (attention in blocks 5, 15, 25, 35); 3.2B parameters.
_GRANITE_MICRO = {
    "layer_types": ["attention" if i % 10 == 5 else "mamba" for i in range(40)],
    "intermediate_size": 8192, "shared_intermediate_size": 8192, "num_local_experts": 0,
    "num_experts_per_tok": 0, "num_attention_heads": 32, "num_key_value_heads": 8,
    "mamba_n_heads": 64, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1,
    "position_embedding_type": None, "tie_word_embeddings": True,
}  # fmt: skip
# The table of transformers' docs (model_doc/falcon_h1) and a config.json in tests of an importer,
# with chunks of 128, as smaller ones have; transformers' default is 256. 7.6B parameters.
_FALCON_H1_7B = {
    "intermediate_size": 12288, "num_attention_heads": 12, "num_key_value_heads": 2,
    "head_dim": 128, "mamba_d_ssm": 3072, "mamba_n_heads": 24, "mamba_d_head": 128,
    "mamba_d_state": 256, "mamba_n_groups": 1, "mamba_chunk_size": 128,
    "tie_word_embeddings": False,
}  # fmt: skip
# transformers' docs (model_doc/bamba) and its defaults; 9.8B parameters.
_BAMBA_9B = {
    "intermediate_size": 14336, "attn_layer_indices": [9, 18, 27], "num_attention_heads": 32,
    "num_key_value_heads": 8, "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_d_state": 128,
    "mamba_n_groups": 1, "tie_word_embeddings": False,
}  # fmt: skip
# vLLM's tests/config/model_arch_groundtruth.json has width, blocks, heads, vocabulary; ports have
# the hybrid blocks and 14,704 columns of in_proj. With a four times wider MLP, adapters of 128 and
# two shared blocks that makes 7.36B parameters: 7.4B in arXiv:2411.15242.
_ZAMBA2_7B = {
    "layers_block_type": [
        "hybrid" if i in (6, 11, 17, 23, 29, 35, 41, 47, 53, 59, 65, 71, 77) else "mamba"
        for i in range(81)
    ],
    "intermediate_size": 14336, "num_attention_heads": 32, "attention_head_dim": 224,
    "num_mem_blocks": 2, "use_mem_rope": True, "adapter_rank": 128, "mamba_d_state": 64,
    "n_mamba_heads": 112, "mamba_headdim": 64, "mamba_ngroups": 2, "tie_word_embeddings": True,
}  # fmt: skip

SIZES = {
    "mamba-130m": Sizes("mamba", 768, 24, 50280, "state-spaces/mamba-130m-hf", _MAMBA),
    "mamba-1.4b": Sizes("mamba", 2048, 48, 50280, "state-spaces/mamba-1.4b-hf", _MAMBA),
    "mamba-2.8b": Sizes("mamba", 2560, 64, 50280, "state-spaces/mamba-2.8b-hf", _MAMBA),
    "falcon-mamba-7b": Sizes(
        "falcon_mamba", 4096, 64, 65024, "tiiuae/falcon-mamba-7b", _FALCON_MAMBA
    ),
    "nemotron-3-nano-30b-a3b": Sizes(
        "nemotron_h", 2688, 52, 131072, "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", _NANO_30B
    ),
    "nemotron-3-nano-4b": Sizes(
        "nemotron_h", 3136, 42, 131072, "nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16", _NANO_4B
    ),
    "nemotron-h-8b": Sizes(
        "nemotron_h", 4096, 52, 131072, "nvidia/Nemotron-H-8B-Base-8K", _NEMOTRON_8B
    ),
    "granite-4.0-h-micro": Sizes(
        "granitemoehybrid", 2048, 40, 100352, "ibm-granite/granite-4.0-h-micro", _GRANITE_MICRO
    ),
    "falcon-h1-7b": Sizes(
        "falcon_h1", 3072, 44, 130048, "tiiuae/Falcon-H1-7B-Base", _FALCON_H1_7B
    ),
    "bamba-9b": Sizes("bamba", 4096, 32, 128256, "ibm-ai-platform/Bamba-9B-v2", _BAMBA_9B),
    "zamba2-7b": Sizes("zamba2", 3584, 81, 32000, "Zyphra/Zamba2-7B", _ZAMBA2_7B),
    "mamba2-2.7b": Sizes(
        "mamba2", 2560, 64, 50288, "AntonV/mamba2-2.7b-hf",
        {"num_heads": 80, "head_dim": 64, "state_size": 128, "n_groups": 1,
         "tie_word_embeddings": True},
    ),
    # The defaults of transformers' configurations are these two's.
    "zamba-7b": Sizes("zamba", 3712, 76, 32000, "Zyphra/Zamba-7B-v1", {}),
    "jamba-52b": Sizes("jamba", 4096, 32, 65536, "ai21labs/Jamba-v0.1", {}),
    "tiny": Sizes("mamba", 32, 4, 512, "embedded", _MAMBA),
    "tiny-moe": Sizes(
        "nemotron_h", 64, 4, 512, "embedded",
        _nemotron_h(
            "ME*M", mamba_num_heads=4, mamba_head_dim=32, ssm_state_size=16, n_groups=1,
            head_dim=16, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
            moe_intermediate_size=96, moe_shared_expert_intermediate_size=64, n_routed_experts=8,
            num_experts_per_tok=2,
        ),
    ),
}  # fmt: skip


def transformers_config(model: str) -> Any:
    """The configuration of one of :data:`SIZES`."""
    from transformers import AutoConfig

    sizes = SIZES[model]
    return AutoConfig.for_model(
        sizes.family, hidden_size=sizes.width, num_hidden_layers=sizes.layers,
        vocab_size=sizes.vocabulary, use_cache=False, **sizes.options,
    )  # fmt: skip
