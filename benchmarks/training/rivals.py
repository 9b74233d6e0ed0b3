"""What a job's tokens a second are held to: the frozen model, and PEFT's adapters.

*Frozen*: the same weights at the same levels; a vector added to the embeddings trains, so that the
gradient goes through every block. *PEFT*: LoRA with r = 16 on the same projectors, as QLoRA has it
where the job stores its weights: every linear layer of the blocks in bitsandbytes' NF4 (head and
embeddings in bf16, as it leaves them), transformers' gradient checkpointing, the logits of all
tokens at once, and mixers on their separate kernels, since the fused ones leave ``out_proj``'s
adapter out. Their 3-D experts bitsandbytes leaves in bf16.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.rows import Unavailable
from benchmarks.training.jobs import Job
from benchmarks.training.random_weights import random_packed
from benchmarks.training.sizes import transformers_config
from prodial_kernels.models.layers.blocks import blocks_of
from prodial_kernels.models.methods.mixer_parts import mixers_of
from prodial_kernels.models.mixers.hf import unfused_forward
from prodial_kernels.models.patch_point import AdaptedMixer
from prodial_kernels.training.step.optimizers import adapter_parameter_groups, make_optimizer

RANK = 16


def train_nothing(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Freeze a model but for a vector that is added to its embeddings; return the optimiser.

    To be called when everything else about the model is settled.
    """
    model.requires_grad_(False)
    whole: Any = model
    embedding: nn.Module = whole.get_input_embeddings()
    device = next(model.parameters()).device
    added = nn.Parameter(torch.zeros(whole.config.hidden_size, device=device))
    embedding.register_parameter("added", added)

    def add(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output + added.to(output.dtype)

    embedding.register_forward_hook(add)
    groups = adapter_parameter_groups(model, weight_decay=0.0)
    return make_optimizer("adamw", groups, lr=lr, device=device)


def with_peft(
    job: Job, place: torch.device, dtype: torch.dtype, lr: float
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build a job's model with random weights and PEFT's adapters, ready for training.

    Raises:
        Unavailable: PEFT or bitsandbytes is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise Unavailable(f"{error} (pip install peft)") from None
    model: Any = random_packed(transformers_config(job.model), place, dtype, None)
    model.requires_grad_(False)
    blocks: Any = nn.ModuleList(blocks_of(model))
    if job.quantize is not None:
        _store(blocks, dtype)
    # The blocks carry no model type, by which PEFT would know them and refuse out_proj.
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["in_proj", "out_proj"])
    peft.inject_adapter_in_model(config, blocks)
    for name, parameter in blocks.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    for _, mixer in mixers_of(model):
        AdaptedMixer(mixer, {"forward": unfused_forward})
    # The second is what older releases call it.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(getattr(model, name) for name in names if hasattr(model, name))({"use_reentrant": False})
    groups = adapter_parameter_groups(model, weight_decay=0.01)
    return model, make_optimizer("adamw", groups, lr=lr, device=place)


def _store(blocks: Any, dtype: torch.dtype) -> None:
    """Put bitsandbytes' NF4 layers in the place of linear ones, a weight at a time."""
    try:
        bnb: Any = import_module("bitsandbytes.nn")
    except ImportError as error:
        raise Unavailable(f"{error} (pip install bitsandbytes)") from None
    # Else PEFT takes them for dense ones.
    blocks.is_loaded_in_4bit = True
    # Of blocks that share their weights, once.
    stored: dict[int, nn.Parameter] = {}
    for parent in list(blocks.modules()):
        for name, layer in list(parent.named_children()):
            # Mamba-1 of transformers reads this one's weight, which would be packed.
            if type(layer) is not nn.Linear or name == "dt_proj":
                continue
            new: Any = bnb.Linear4bit(1, 1, False, dtype, quant_type="nf4", device="meta")
            new.in_features, new.out_features = layer.in_features, layer.out_features
            if id(layer.weight) not in stored:
                values = bnb.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                stored[id(layer.weight)] = values.to(layer.weight.device)
            new.weight, new.bias = stored[id(layer.weight)], layer.bias
            setattr(parent, name, new)
