"""What the target lists that toolkits publish do in the families of Mamba models, as a table.

``python -m benchmarks.target_lists`` writes ``prodial_kernels/models/TARGETS.md``; it needs no GPU
and no weights. ``prodial inspect MODEL --list all`` says the same of one model, at length.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prodial_kernels.models.diagnosis.doctor import (
    ABSENT,
    ADAPTED,
    DEAD,
    DEAD_WHEN_FUSED,
    PARAMETER,
    REFUSED,
    UNSUPPORTED,
    Diagnosis,
    Finding,
    diagnose,
)
from prodial_kernels.models.diagnosis.published import PUBLISHED, published_for

PAGE = Path(__file__).parents[1] / "prodial_kernels" / "models" / "TARGETS.md"

_HYBRID = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 64, "vocab_size": 64}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
_SSD = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 1}
_MIXED = ["mamba", "attention", "mamba", "attention"]
_QWEN = {
    **_HYBRID, **_HEADS, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 32,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", {"hidden_size": 64, "num_hidden_layers": 2}),
    "mamba2": (
        "Mamba2", {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 32},
    ),
    "falcon_mamba": ("FalconMamba", {"hidden_size": 64, "num_hidden_layers": 2}),
    "jamba": (
        "Jamba",
        {**_HYBRID, **_HEADS, "num_experts": 2, "attn_layer_period": 4, "attn_layer_offset": 1},
    ),
    "zamba": (
        "Zamba",
        {
            **_HYBRID, "num_attention_heads": 2, "num_key_value_heads": 2,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        },
    ),
    "bamba": ("Bamba", {**_HYBRID, **_HEADS, **_SSD, "attn_layer_indices": [1, 3]}),
    "zamba2": (
        "Zamba2",
        {
            **_HYBRID, "num_attention_heads": 2, "num_key_value_heads": 2, "n_mamba_heads": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 1,
            "hybrid_layer_ids": [1, 3], "mamba_ngroups": 1,
        },
    ),
    "falcon_h1": ("FalconH1", {**_HYBRID, **_HEADS, **_SSD, "mamba_d_ssm": 128, "head_dim": 32}),
    "granitemoehybrid": (
        "GraniteMoeHybrid", {**_HYBRID, **_HEADS, **_SSD, "layer_types": _MIXED},
    ),
    "nemotron_h, dense": (
        "NemotronH",
        {
            **_HYBRID, **_HEADS, "head_dim": 32, "mamba_num_heads": 4, "mamba_head_dim": 32,
            "n_groups": 1, "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
        },
    ),
    "nemotron_h, experts": (
        "NemotronH",
        {
            **_HYBRID, **_HEADS, "head_dim": 32, "mamba_num_heads": 4, "mamba_head_dim": 32,
            "n_groups": 1, "layers_block_type": ["mamba", "attention", "mamba", "moe"],
            "n_routed_experts": 4, "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
        },
    ),
    "lfm2": (
        "Lfm2", {**_HYBRID, **_HEADS, "layer_types": ["conv", "full_attention"] * 2},
    ),
    "lfm2_moe": (
        "Lfm2Moe",
        {
            **_HYBRID, **_HEADS, "layer_types": ["conv", "full_attention"] * 2, "num_experts": 4,
            "num_experts_per_tok": 2, "num_dense_layers": 2, "moe_intermediate_size": 32,
        },
    ),
    "qwen3_next": (
        "Qwen3Next",
        {**_QWEN, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1},
    ),
    "qwen3_5_text": ("Qwen3_5Text", {**_QWEN}),
}  # fmt: skip
"""Small models of each family, with every kind of layer that it has: class prefix and options."""

_COLUMNS = (
    "model", "toolkit", "targets", "adapted", "dead when fused", "dead", "refused", "absent",
    "mixers",
)  # fmt: skip
_HEADER = """\
# What published target lists do

Which layers of each family the target lists that toolkits publish would train as PEFT's LoRA.

* *Dead when fused*: no gradient while mamba-ssm's kernels train, though without them there is one.
* *Dead*: no effect on any path until the adapter is merged. *Refused*: PEFT raises for the list.
* *Parameters*: experts in one tensor, which PEFT takes as `target_parameters`.
* *Merged once a use*: layers share a weight, and PEFT's merge adds to it for each of them.
* *Mixers*: the share with an adapter that has an effect.

`apply_prodial` adapts every linear layer below, on the fused paths. `prodial inspect MODEL --list
all` says the same of one model.
"""


def build(name: str) -> nn.Module:
    """Build a small model of ``MODELS`` on the ``meta`` device."""
    import transformers

    prefix, options = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(**options)
    cls = getattr(transformers, f"{prefix.removesuffix('Text')}ForCausalLM")
    with torch.device("meta"):
        model: nn.Module = cls(config)
    return model


def page() -> str:
    """Return the whole page."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft"))
    lines = [
        _HEADER,
        f"{libraries}; `python -m benchmarks.target_lists`.",
        "",
        _row(_COLUMNS),
        "|" + "---|" * len(_COLUMNS),
    ]
    for name in MODELS:
        model = build(name)
        for entry in published_for(name.partition(",")[0]):
            diagnosis = diagnose(model, entry.targets, exclude=entry.exclude)
            text = entry.text.replace("|", "\\|")
            lines.append(_row([name, entry.toolkit, f"`{text}`", *_cells(diagnosis)]))
    lines += ["", "Where the lists are from:", ""]
    lines += [f"* {entry.toolkit}, `{entry.text}`: {entry.source}" for entry in PUBLISHED]
    return "\n".join(lines) + "\n"


def _cells(diagnosis: Diagnosis) -> list[str]:
    def named(*statuses: str) -> str:
        found = [f for f in diagnosis.findings if f.status in statuses]
        return " ".join(dict.fromkeys(map(_name, found)))

    mixers = "" if diagnosis.mixers is None else f"{diagnosis.mixers:.0%}"
    adapted = named(ADAPTED)
    if any("merge_and_unload adds" in note for note in diagnosis.notes):
        adapted += " (shared blocks: merged once a use)"
    if diagnosis.refused:
        adapted, mixers = "", "0%"
    absent = named(ABSENT)
    parameters = named(PARAMETER)
    absent += f" ({parameters}: parameters)" if parameters else ""
    return [
        adapted, named(DEAD_WHEN_FUSED), named(DEAD), named(REFUSED, UNSUPPORTED), absent.strip(),
        mixers,
    ]  # fmt: skip


def _name(finding: Finding) -> str:
    named = [part for part in finding.module.split(".") if part != "*"]
    return named[-1] if finding.count else finding.target


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(arguments: Iterable[str] = ()) -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
