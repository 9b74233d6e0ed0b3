"""Which kind of step a run takes: graphed or eager, with which loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from prodial_kernels.training.config import FinetuneConfig
from prodial_kernels.training.step.buckets import Buckets
from prodial_kernels.training.step.eager import EagerStep, TrainingStep
from prodial_kernels.training.step.graphed import GraphChoice, GraphedStep, choose_graph
from prodial_kernels.training.step.loss import check_loss, make_loss


def make_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: FinetuneConfig,
    *,
    device: torch.device,
    autocast_dtype: torch.dtype | None = None,
    checkpoints: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> TrainingStep:
    """Make what takes the steps of a run.

    Args:
        model: The model, ready for training, on ``device``.
        optimizer: Over its trained parameters, with the state to begin with.
        config: A resolved configuration.
        device: Where the model is.
        autocast_dtype: Run forward under autocast to this dtype.
        checkpoints: Whether blocks run again in backward.
        say: Told what was chosen and why, where it is not simply what was asked for.

    Raises:
        GraphError: ``cuda_graph="on"``, and it cannot be.
        LossError: ``loss`` cannot be used on this model or machine.
    """
    choice = _choose(config, device, checkpoints)
    loss, why = make_loss(model, config.loss, graphed=choice.graphed)
    if loss.name == "full" and config.loss != "full":
        say(f"loss: {why}")
    if device.type == "cuda":
        graphed = "in one CUDA graph" if choice.graphed else "launched one by one"
        say(f"loss {loss.name} ({why}); steps {graphed} ({choice.reason})")
    if not choice.graphed:
        return EagerStep(loss, optimizer, clip=config.clip, autocast_dtype=autocast_dtype)
    from prodial_kernels.training.step.cuda_graphs import CudaGraphs

    return GraphedStep(
        loss,
        optimizer,
        Buckets(config.batch_size or 1, config.seq_len or 2),
        CudaGraphs(device),
        clip=config.clip,
        autocast_dtype=autocast_dtype,
        required=config.cuda_graph == "on",
        say=say,
    )


def check_step(config: FinetuneConfig, device: torch.device) -> None:
    """Raise where :func:`make_step` would whatever the model.

    Raises:
        GraphError: As :func:`make_step`.
        LossError: As :func:`make_step`.
    """
    choice = _choose(config, device, checkpoints=False)
    check_loss(config.loss, device, graphed=choice.graphed)


def _choose(config: FinetuneConfig, device: torch.device, checkpoints: bool) -> GraphChoice:
    return choose_graph(
        config.cuda_graph,
        device=device,
        tokens=(config.batch_size or 1) * (config.seq_len or 2),
        parts=config.grad_accumulation,
        obstacles=_obstacles(config, checkpoints),
    )


def _obstacles(config: FinetuneConfig, checkpoints: bool) -> list[str]:
    """What a run asks for that no graph can hold."""
    obstacles = []
    if config.loss == "liger":
        obstacles.append("loss 'liger' waits for the device")
    if (checkpoints or config.chosen_activations == "checkpoint") and config.lora_dropout:
        obstacles.append("recomputing dropout reads the random generator's state on the host")
    return obstacles
