"""What can be refused before a model is loaded or anything is written."""

from __future__ import annotations

import torch

from prodial_kernels.models.adapt.inject import apply_prodial
from prodial_kernels.models.loading.load import empty_model, resolve_dtype
from prodial_kernels.training.config import FinetuneConfig
from prodial_kernels.training.method import check_rank, matched_lora_rank
from prodial_kernels.training.run.projectors import check_implementation
from prodial_kernels.training.step.choose import check_step
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
    check_step(config, device)


def check_fit(config: FinetuneConfig, dtype: torch.dtype) -> None:
    """Raise unless the adapter fits the model, by the shapes that its configuration gives.

    Args:
        config: A resolved configuration.
        dtype: Dtype of the model's weights.

    Raises:
        ModelError: There is no such model, or its configuration cannot be read.
        ValueError: The adapter does not fit the model.
    """
    if config.method == "full":
        return
    model = empty_model(config.model, dtype=dtype)
    rank = matched_lora_rank(model, config.reference_adapter()) if config.r is None else None
    adapter = config.adapter(r=rank)
    if config.r is not None:
        check_rank(model, adapter)
    apply_prodial(model, adapter)
