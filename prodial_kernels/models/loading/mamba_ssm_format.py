"""Checkpoints in mamba_ssm's own format: their configuration and names, as transformers has them.

``config.json`` has the fields of mamba_ssm's ``MambaConfig`` (``d_model``, ``n_layer``,
``ssm_cfg``, …) and no ``model_type``, and the embedding is ``backbone.embedding`` instead of
``backbone.embeddings``; all other names are the same. What transformers' classes cannot compute is
refused by name. The format holds no tokenizer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EMBEDDING, _OWN_EMBEDDING = "backbone.embedding.", "backbone.embeddings."

TOKENIZER = "EleutherAI/gpt-neox-20b"
"""Of the models that mamba_ssm's authors published (``state-spaces/mamba-…``, ``mamba2-…``)."""
_VOCABULARY_OF_IT = 50277

# Of MambaConfig, with the values that are computed here; None for any.
_FIELDS: dict[str, tuple[Any, ...] | None] = {
    "d_model": None, "n_layer": None, "vocab_size": None, "ssm_cfg": None,
    "pad_vocab_size_multiple": None, "residual_in_fp32": None, "tie_embeddings": None,
    # How it is computed, not what.
    "fused_add_norm": None, "attn_cfg": None,
    "d_intermediate": (0,), "attn_layer_idx": ([], None), "rms_norm": (True,),
}  # fmt: skip
# Of ssm_cfg: what initial values are drawn by, and what kernels are run by.
_WITHOUT_EFFECT = (
    "layer", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "conv_init",
    "A_init_range", "use_fast_path", "use_mem_eff_path", "sequence_parallel",
)  # fmt: skip
_MAMBA1 = {
    "d_state": ("state_size", 16), "d_conv": ("conv_kernel", 4), "expand": ("expand", 2),
    "dt_rank": ("time_step_rank", "auto"), "conv_bias": ("use_conv_bias", True),
    "bias": ("use_bias", False),
}  # fmt: skip
_MAMBA2 = {
    "d_state": ("state_size", 128), "d_conv": ("conv_kernel", 4), "expand": ("expand", 2),
    "headdim": ("head_dim", 64), "ngroups": ("n_groups", 1), "chunk_size": ("chunk_size", 256),
    "dt_limit": ("time_step_limit", (0.0, float("inf"))), "conv_bias": ("use_conv_bias", True),
    "bias": ("use_bias", False),
}  # fmt: skip
_ONLY_OF_MAMBA2 = {
    "d_ssm": (None,), "D_has_hdim": (False,), "rmsnorm": (True,), "norm_before_gate": (False,),
    "process_group": (None,),
}  # fmt: skip


def is_mamba_ssm(config: Mapping[str, Any]) -> bool:
    """Whether the content of a ``config.json`` is mamba_ssm's."""
    return "model_type" not in config and {"d_model", "n_layer"} <= config.keys()


def config_of(content: Mapping[str, Any]) -> PretrainedConfig:
    """Return transformers' configuration of a model in mamba_ssm's format.

    Raises:
        ValueError: A field is missing or unknown, or asks for what transformers does not compute.
    """
    from transformers import Mamba2Config, MambaConfig

    for name, value in content.items():
        if name not in _FIELDS:
            raise ValueError(f"config.json, in mamba_ssm's format, has {name!r}, which is unknown")
        _check(name, value, _FIELDS[name])
    sizes: dict[str, Any] = {}
    for name in ("d_model", "n_layer", "vocab_size"):
        value = content.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"config.json: {name} must be a whole number from 1 on, got {value!r}")
        sizes[name] = value
    mixer = content.get("ssm_cfg") or {}
    if not isinstance(mixer, Mapping):
        raise ValueError(f"config.json: ssm_cfg must be an object, got {mixer!r:.60}")
    layer = mixer.get("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2"):
        raise ValueError(f"ssm_cfg: layer {layer!r} has no class in transformers")
    known, only = (_MAMBA1, {}) if layer == "Mamba1" else (_MAMBA2, _ONLY_OF_MAMBA2)
    options: dict[str, Any] = dict(known.values())
    for name, value in mixer.items():
        if name in known:
            options[known[name][0]] = value
        elif name in only:
            _check(f"ssm_cfg: {name}", value, only[name])
        elif name not in _WITHOUT_EFFECT:
            raise ValueError(f"ssm_cfg has {name!r}, which is unknown")
    width, multiple = sizes["d_model"], content.get("pad_vocab_size_multiple", 8)
    common: dict[str, Any] = {
        "vocab_size": -(-sizes["vocab_size"] // multiple) * multiple,
        "hidden_size": width,
        "num_hidden_layers": sizes["n_layer"],
        "layer_norm_epsilon": 1e-5,
        "residual_in_fp32": bool(content.get("residual_in_fp32", True)),
        "tie_word_embeddings": bool(content.get("tie_embeddings", True)),
        # transformers would divide out_proj whenever it loads the model; mamba_ssm does it once.
        "rescale_prenorm_residual": False,
        # The tokenizer says.
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        "architectures": ["MambaForCausalLM" if layer == "Mamba1" else "Mamba2ForCausalLM"],
    }  # fmt: skip
    if layer == "Mamba1":
        return MambaConfig(**common, **options)
    options["num_heads"] = int(options["expand"] * width) // options["head_dim"]
    options["time_step_limit"] = tuple(map(float, options["time_step_limit"]))
    _check_groups(options["n_groups"])
    return Mamba2Config(**common, **options)


def renamed(name: str) -> str:
    """Return a tensor's name of mamba_ssm as it is in transformers."""
    return name.replace(EMBEDDING, _OWN_EMBEDDING, 1) if name.startswith(EMBEDDING) else name


def has_its_names(names: Iterable[str]) -> bool:
    """Whether tensors are named as mamba_ssm names them."""
    return any(name.startswith(EMBEDDING) for name in names)


def published_vocabulary(content: Mapping[str, Any]) -> bool:
    """Whether a configuration is of the size of :data:`TOKENIZER`, padded or not."""
    size = content.get("vocab_size")
    return isinstance(size, int) and _VOCABULARY_OF_IT <= size < _VOCABULARY_OF_IT + 16


def _check(name: str, value: Any, allowed: tuple[Any, ...] | None) -> None:
    if allowed is not None and value not in allowed:
        raise ValueError(
            f"config.json, in mamba_ssm's format, has {name} {value!r:.60}, which transformers' "
            f"Mamba models do not compute (only {allowed[0]!r}); use it in Python, with "
            "mamba_ssm's MambaLMHeadModel"
        )


def _check_groups(groups: int) -> None:
    """Raise where this transformers norms all groups of Mamba-2 together (5.17 does)."""
    from transformers.models.mamba2 import modeling_mamba2

    norm: Any = modeling_mamba2.MambaRMSNormGated
    if groups > 1 and "group_size" not in inspect.signature(norm.__init__).parameters:
        raise ValueError(
            f"ssm_cfg: ngroups {groups} needs a norm for each group, which this release of "
            "transformers does not compute; update it"
        )
