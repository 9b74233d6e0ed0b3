"""What can be refused before a model is loaded or anything is written."""

from __future__ import annotations

import torch

from prodial_kernels.models.loading.load import resolve_dtype
from prodial_kernels.training.config import FinetuneConfig
from prodial_kernels.training.run.projectors import check_implementation
from prodial_kernels.training.step.choose import ModelFacts, decide
from prodial_kernels.training.step.optimizers import check_optimizer


def check_options(config: FinetuneConfig, device: torch.device) -> None:
    """Raise if options cannot be used together, or not on this device.

    Args:
        config: A resolved configuration.
        device: Where the run is to be.

    Raises:
        ConfigError: ``impl`` cannot run on this machine.
        GraphError: ``cuda_graph="on"``, and it cannot be.
        LossError: ``loss`` cannot be used on this machine.
        OptimizerError: ``optimizer`` cannot be used on this machine.
        ValueError: Options of the adapter that are out of range or contradict each other.
    """
    if config.method != "full":
        # A LoRA without a rank gets it from the model: any will do to check the rest.
        config.adapter(r=1)
    check_implementation(config.impl, device, resolve_dtype(config.dtype, device))
    check_optimizer(config.optimizer, device)
    # Of the model no more is known yet.
    decide(config, ModelFacts(draws_numbers=bool(config.lora_dropout)), device)
