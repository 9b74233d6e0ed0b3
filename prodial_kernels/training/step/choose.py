"""How a run takes its steps, decided once: captured or launched one by one, and with which loss.

:func:`decide` needs no weights, so the memory plan counts what :func:`make_step` then makes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from prodial_kernels.models.layers.blocks import blocks_of
from prodial_kernels.models.layers.head import head_obstacle
from prodial_kernels.models.layers.recompute import draws_numbers
from prodial_kernels.quantization.modules.experts import QuantizedExperts
from prodial_kernels.quantization.modules.selection import is_experts
from prodial_kernels.training.config import ResolvedConfig
from prodial_kernels.training.distributed.gradients import GradientSum
from prodial_kernels.training.step.eager import EagerStep, TrainingStep
from prodial_kernels.training.step.graphed import Buckets, CudaGraphs, GraphedStep, choose_graph
from prodial_kernels.training.step.loss import choose_loss, make_loss


@dataclass(frozen=True)
class ModelFacts:
    """What of a model its steps depend on.

    Attributes:
        head_obstacle: Why its logits cannot be computed a few at a time; None if they can.
        draws_numbers: Whether a block draws random numbers in training, as dropout does.
        experts: Whether it has mixtures of experts, which can be stored.
    """

    head_obstacle: str | None = None
    draws_numbers: bool = False
    experts: bool = False


@dataclass(frozen=True)
class StepChoice:
    """How the steps of a run are taken.

    Attributes:
        graphed: Whether a step is captured in a CUDA graph.
        loss: ``"chunked"``, ``"liger"`` or ``"full"``.
        graph_reason: Why it is captured or not.
        loss_reason: Why this loss.
    """

    graphed: bool
    loss: str
    graph_reason: str = "as asked for"
    loss_reason: str = "as asked for"

    def __str__(self) -> str:
        steps = "in one CUDA graph" if self.graphed else "launched one by one"
        return f"loss {self.loss} ({self.loss_reason}); steps {steps} ({self.graph_reason})"


def facts_of(model: nn.Module) -> ModelFacts:
    """Read off a model, ready for training or on ``meta``, what :func:`decide` asks of it."""
    try:
        random = any(map(draws_numbers, blocks_of(model)))
    except ValueError:
        # Without a list of blocks none of it is ever run again in backward.
        random = False
    experts = any(is_experts(m) or isinstance(m, QuantizedExperts) for m in model.modules())
    return ModelFacts(head_obstacle(model), random, experts)


def decide(
    config: ResolvedConfig, model: ModelFacts, device: torch.device, *, checkpoints: bool = False
) -> StepChoice:
    """Decide how a run takes its steps; a pure function but for whether liger-kernel is installed.

    Args:
        config: What the run is to do.
        model: Of the model as it will be trained.
        device: Where the run will be.
        checkpoints: Whether a memory plan lets blocks run again in backward; those that
            ``config`` asks for are counted in any case.

    Raises:
        GraphError: ``cuda_graph="on"``, and it cannot be.
        LossError: ``loss`` cannot be used on this model or machine.
    """
    obstacles = []
    if config.loss == "liger":
        obstacles.append("loss 'liger' waits for the device")
    stored = config.quantize is not None and config.quantize_modules == "all"
    if model.experts and stored:
        obstacles.append("which experts a batch takes is read on the host")
    if config.shard:
        obstacles.append("shard gathers weights from other processes within a step")
    again = checkpoints or config.chosen_activations in ("checkpoint", "offload")
    if model.draws_numbers and again:
        obstacles.append("recomputing dropout reads the random generator's state on the host")
    graphed, graph_reason = choose_graph(
        config.cuda_graph, device=device,
        tokens=config.batch_size * config.seq_len, parts=config.grad_accumulation,
        obstacles=obstacles,
    )  # fmt: skip
    loss, loss_reason = choose_loss(
        config.loss, device, graphed=graphed, head_obstacle=model.head_obstacle, stored_head=stored
    )
    return StepChoice(graphed, loss, graph_reason, loss_reason)


def make_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: ResolvedConfig,
    choice: StepChoice,
    *,
    device: torch.device,
    autocast_dtype: torch.dtype | None = None,
    gradients: GradientSum | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> TrainingStep:
    """Make what takes the steps of a run.

    Args:
        model: The model, ready for training, on ``device``.
        optimizer: Over its trained parameters, with the state to begin with.
        config: What the run is to do.
        choice: What :func:`decide` returned for it.
        device: Where the model is.
        autocast_dtype: Run forward under autocast to this dtype.
        gradients: Sums over the processes of the run; None where there is one.
        say: Told what was chosen and why, where it is not simply what was asked for.

    Raises:
        LossError: The loaded model's head cannot be used as the choice has it.
    """
    loss = make_loss(model, choice.loss)
    if choice.loss == "full" != config.loss:
        say(f"loss: {choice.loss_reason}")
    if device.type == "cuda":
        say(str(choice))
    if not choice.graphed:
        return EagerStep(
            loss, optimizer, clip=config.clip, autocast_dtype=autocast_dtype, gradients=gradients
        )
    return GraphedStep(
        loss,
        optimizer,
        Buckets(config.batch_size, config.seq_len),
        CudaGraphs(device),
        clip=config.clip,
        autocast_dtype=autocast_dtype,
        required=config.cuda_graph == "on",
        gradients=gradients,
        say=say,
    )
