"""Target lists that other toolkits publish for Mamba models and hybrids, with their sources.

Collected from the files named, at the commits named; a list stands as it is written there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ALL_LINEAR = "all-linear"
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_ANY = ("*",)


@dataclass(frozen=True)
class Published:
    """One list.

    Attributes:
        toolkit: Who publishes it.
        models: The ``model_type`` that it is for, or ``"*"`` for any.
        targets: Names, one regular expression, or ``"all-linear"``.
        source: File and commit.
        exclude: Names of targets that it leaves out.
    """

    toolkit: str
    models: tuple[str, ...]
    targets: str | tuple[str, ...]
    source: str
    exclude: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The list, as one writes it."""
        names = self.targets if isinstance(self.targets, str) else " ".join(self.targets)
        return names + (f", not {' '.join(self.exclude)}" if self.exclude else "")


PUBLISHED: tuple[Published, ...] = (
    Published(
        "peft", ("nemotron_h",), _ATTENTION,
        "peft 0.21.2, utils/constants.py: the default of the type; no other type here has one",
    ),
    Published(
        "trl", ("nemotron_h",), (*_ATTENTION, *_MLP),
        "trl f2cd57710, examples/scripts/sft_nemotron_3.py",
    ),
    Published(
        "unsloth", _ANY, (*_ATTENTION, *_MLP),
        "unsloth 015bdef0d9, models/llama.py: the default of get_peft_model",
    ),
    Published(
        "unsloth", ("granitemoehybrid",),
        (*_ATTENTION, *_MLP, "shared_mlp.input_linear", "shared_mlp.output_linear"),
        "unsloth 015bdef0d9, studio/…/granite/unsloth_granite-4.0-h-micro.yaml",
    ),
    Published(
        "unsloth", ("nemotron_h",), (*_ATTENTION, *_MLP, "in_proj", "out_proj"),
        "unsloth 015bdef0d9, studio/…/other/unsloth_Nemotron-3-Nano-30B-A3B.yaml",
    ),
    Published(
        "unsloth", ("lfm2",), ALL_LINEAR,
        "unsloth 015bdef0d9, studio/…/other/unsloth_LFM2-1.2B.yaml",
    ),
    Published(
        "axolotl", ("nemotron_h",), _ATTENTION,
        "axolotl 067b021c8, examples/nemotron-h/nano-30b-a3b-qlora.yaml",
    ),
    Published(
        "axolotl", ("falcon_h1",), (*_ATTENTION, "in_proj", *_MLP),
        "axolotl 067b021c8, examples/falcon-h1/falcon-h1-1b-qlora.yaml",
    ),
    Published(
        "axolotl", ("jamba",), ALL_LINEAR,
        "axolotl 067b021c8, examples/jamba/qlora.yaml: lora_target_linear",
    ),
    Published(
        "axolotl", ("lfm2_moe",),
        r"model.layers.[\d]+.(mlp|cross_attn|self_attn).(up|down|gate|q|k|v|o)_proj",
        "axolotl 067b021c8, examples/LiquidAI/lfm2-8b-a1b-lora.yaml",
    ),
    Published(
        "axolotl", ("qwen3_next",),
        (
            "linear_attn.in_proj_ba", "linear_attn.in_proj_qkvz", "linear_attn.out_proj",
            "shared_expert.up_proj", "shared_expert.down_proj", "shared_expert.gate_proj",
            "q_proj", "v_proj", "k_proj", "o_proj",
        ),
        "axolotl 067b021c8, examples/qwen3-next/qwen3-next-80b-a3b-qlora.yaml",
    ),
    Published(
        "axolotl", ("qwen3_5_text",), (*_ATTENTION, "down_proj", "up_proj"),
        "axolotl 067b021c8, examples/qwen3.5/27b-qlora.yaml",
    ),
    Published(
        "nemo", ("nemotron_h",), ALL_LINEAR,
        "NeMo Automodel 36044ad3d, examples/llm_finetune/nemotron/nemotron_nano_v3_singlegpu_lora",
        exclude=("out_proj",),
    ),
    Published(
        "nemo", ("falcon_h1",), r".*_proj",
        "NeMo Automodel 36044ad3d, examples/llm_finetune/falcon/falcon_h1_34b_instruct_squad_peft",
    ),
    Published(
        "llamafactory", _ANY, ALL_LINEAR,
        "LLaMA-Factory ff6d4d12e: lora_target all",
    ),
    Published(
        "ms-swift", ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"), ALL_LINEAR,
        "ms-swift 3602360a5: all-linear without what PEFT refuses",
        exclude=("out_proj", "conv1d"),
    ),
)  # fmt: skip

TOOLKITS = tuple(dict.fromkeys(entry.toolkit for entry in PUBLISHED))


def published_for(model_type: str, toolkits: Iterable[str] = TOOLKITS) -> list[Published]:
    """Return what ``toolkits`` publish for a ``model_type``; what is for any model is last."""
    wanted = {*toolkits}
    found = [entry for entry in PUBLISHED if entry.toolkit in wanted]
    own = [entry for entry in found if model_type in entry.models]
    return [*own, *(entry for entry in found if entry.models == _ANY)]
