"""Training and scoring of many rows of one task at once: one step of all runs is one CUDA graph."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.quality.side_by_side.learner import Learner
from benchmarks.quality.side_by_side.weights import Method, Start
from benchmarks.quality.study.row import Recipe, Spec
from benchmarks.quality.study.train import order_of, share_of_rate
from prodial_kernels.training.step.graphed import CudaGraphs

__all__ = ["Member", "Stack", "Trained"]

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
_EAGER = 2  # steps before the graph is recorded, in which kernels are compiled


@dataclass(frozen=True)
class Member:
    """One run of a stack."""

    spec: Spec
    method: Method
    start: Start


@dataclass(frozen=True)
class Trained:
    """What the training of a stack gave.

    Attributes:
        losses: Of each run, the mean of its last tenth.
        seconds: Of all.
        step_seconds: Of a step once the graph is recorded, a mean.
    """

    losses: list[float]
    seconds: float
    step_seconds: float


class Stack:
    """Runs of one task and recipe, trained together; those of one method and budget are adjacent.

    AdamW, clipping and the schedule are those of ``study/train.py``, by run.
    """

    def __init__(
        self,
        learner: Learner,
        base: Mapping[str, Tensor],
        members: Sequence[Member],
    ) -> None:
        """Prepare runs.

        Args:
            learner: The task, on the device.
            base: The base's weights, there too.
            members: The runs, in any order.

        Raises:
            ValueError: No members, or of several recipes.
        """
        self.recipe = _recipe_of(members)
        self.learner, self.base, self.device = learner, base, learner.device
        self.members = sorted(members, key=lambda m: (m.spec.method, m.spec.budget))
        groups = itertools.groupby(self.members, key=lambda m: (m.spec.method, m.spec.budget))
        self._groups = [list(group) for _, group in groups]
        self._flat = [
            torch.stack([m.start.values for m in group]).to(self.device).requires_grad_()
            for group in self._groups
        ]
        self._first = [torch.zeros_like(flat) for flat in self._flat]
        self._second = [torch.zeros_like(flat) for flat in self._flat]
        self._rates = [
            torch.tensor([[m.spec.learning_rate] for m in group], device=self.device)
            for group in self._groups
        ]
        self._own = set().union(*(group[0].method.touches for group in self._groups))
        recipe, runs = self.recipe, len(self.members)
        seeds = [m.spec.seed for m in self.members]
        orders = {seed: self._order(seed) for seed in sorted(set(seeds))}
        batches = torch.stack([orders[seed] for seed in seeds], 1)
        self._batches = batches.to(self.device)  # [steps, runs, batch]
        shares = [share_of_rate(step, recipe) for step in range(recipe.steps)]
        self._shares = torch.tensor(shares, device=self.device)
        self._step = torch.zeros(1, dtype=torch.long, device=self.device)
        self.losses = torch.zeros(recipe.steps, runs, device=self.device)

    def _order(self, seed: int) -> Tensor:
        """Which examples a seed's runs see, [steps, batch]."""
        order = order_of(self.learner.count, self.recipe.batch_size, seed)
        return torch.tensor([next(order) for _ in range(self.recipe.steps)])

    def weights(self) -> dict[str, Tensor]:
        """All weights; those that any run changes have the dimension of runs."""
        made = [
            group[0].method.weights(flat, self.base)
            for group, flat in zip(self._groups, self._flat, strict=True)
        ]
        found = dict(self.base)
        for name in sorted(self._own):
            found[name] = torch.cat(
                [
                    self._of_group(name, own, len(group))
                    for group, own in zip(self._groups, made, strict=True)
                ]
            )
        return found

    def _of_group(self, name: str, own: Mapping[str, Tensor], runs: int) -> Tensor:
        if name in own:
            return own[name]
        if name not in self.base:
            # Tied, but for runs that train an untied one.
            return self._of_group(self.learner.tied[name], own, runs)
        plain = self.base[name]
        return plain.expand(runs, *plain.shape[1:])

    def _gradients(self, losses: Tensor) -> Sequence[Tensor | None]:
        if not losses.requires_grad:
            return [None] * len(self._flat)
        # Runs of "none" have nothing that trains.
        return torch.autograd.grad(losses.sum(), self._flat, allow_unused=True)

    def _update(self) -> None:
        """One step of all runs, without anything that the host decides."""
        chosen = self._batches.index_select(0, self._step)[0]
        losses = self.learner.losses(self.weights(), chosen)
        gradients = self._gradients(losses)
        self.losses.index_copy_(0, self._step, losses.detach()[None])
        share = self._shares[self._step]
        count = (self._step + 1).float()
        correction = [1 - beta**count for beta in _BETAS]
        for flat, gradient, first, second, rates in zip(
            self._flat, gradients, self._first, self._second, self._rates, strict=True
        ):
            if gradient is None:
                continue
            norm = gradient.norm(dim=1, keepdim=True)
            gradient = gradient * (self.recipe.clip / (norm + 1e-6)).clamp(max=1.0)
            rate = rates * share
            with torch.no_grad():
                flat.mul_(1 - rate * self.recipe.weight_decay)
                first.lerp_(gradient, 1 - _BETAS[0])
                second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
                denominator = (second.sqrt() / correction[1].sqrt()).add_(_EPSILON)
                flat.sub_(first / denominator * (rate / correction[0]))
        self._step += 1

    def train(self, graph: bool = True) -> Trained:
        """Run all steps.

        Args:
            graph: Record the step as a CUDA graph, on a GPU.
        """
        steps = self.recipe.steps
        on_gpu = self.device.type == "cuda"
        graphs = CudaGraphs(self.device) if on_gpu and graph else None
        step = self._update
        start = steady = time.perf_counter()
        for done in range(steps):
            if graphs is None:
                step()
            elif done < _EAGER:
                graphs.run(step)
            else:
                if done == _EAGER:
                    step = graphs.capture(step)
                    steady = time.perf_counter()
                step()
        if on_gpu:
            torch.cuda.synchronize(self.device)
        last = self.losses[-max(1, steps // 10) :].mean(0).tolist()
        now = time.perf_counter()
        steady_steps = steps if graphs is None else max(1, steps - _EAGER)
        return Trained(last, now - start, (now - steady) / steady_steps)

    def repeat_last_step(self) -> None:
        """Make the last step once more, for a profile: the runs are no longer what they were."""
        self._step -= 1
        self._update()
        torch.cuda.synchronize(self.device)

    @torch.no_grad()
    def accuracy(self, split: str) -> list[float]:
        """Of each run: the share of a split's examples that it gets right."""
        return self.learner.accuracy(self.weights(), len(self.members), split)


def _recipe_of(members: Sequence[Member]) -> Recipe:
    recipes = {member.spec.recipe for member in members}
    if len(recipes) != 1:
        raise ValueError(f"members: expected runs of one recipe, got {len(recipes)}")
    return recipes.pop()
