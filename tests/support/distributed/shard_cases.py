"""Models whose frozen weights two processes divide; see ``test_sharding.py``."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.models.mamba2.modeling_mamba2
import transformers.models.zamba2.modeling_zamba2  # noqa: F401  # before the processes fork
from torch import Tensor, nn

from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.checkpoint.sharded import is_sharded, whole
from prodial_kernels.models.layers.blocks import blocks_of
from prodial_kernels.quantization.convert import quantize_linear
from prodial_kernels.quantization.modules.experts import QuantizedStack
from prodial_kernels.training.distributed.sharding import shard_frozen
from support.captured.steps import checkpointing
from support.distributed.user_cases import message, process_group
from support.models import build, randomise_adapters, token_ids

CPU = torch.device("cpu")


def pair(family: str, **options: Any) -> tuple[Any, Any, Any]:
    """An adapted model that is divided, the same one in one piece, and the former's blocks."""
    model = build(family, **options)
    apply_prodial(model, ProdialConfig(r=2))
    randomise_adapters(model)
    plain = copy.deepcopy(model)
    return model, plain, shard_frozen(model, CPU)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    # Each process has rows of its own.
    ids = token_ids(seed=seed + 10 * int(os.environ["RANK"]))
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def same(model: nn.Module, plain: nn.Module, run: Callable[[nn.Module], Any]) -> bool:
    """Whether values and gradients of both are equal, bit for bit."""
    values, expected = run(model), run(plain)
    found, right = gradients(model), gradients(plain)
    pairs = zip(found, right, strict=True)
    return (
        torch.equal(values, expected) and all(torch.equal(a, b) for a, b in pairs) and found != []
    )


def step(model: nn.Module, seed: int = 1) -> Tensor:
    loss = loss_of(model, seed)
    loss.backward()
    return loss.detach()


def evaluated(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return loss_of(model, 3)


def one_behind_the_other(model: nn.Module) -> Tensor:
    """Two forwards before their backwards, the first one's first."""
    losses = [loss_of(model, seed) for seed in (4, 5)]
    for loss in losses:
        loss.backward()
    return torch.stack(losses).detach()


def steps(place: Path) -> dict[str, Any]:
    with process_group():
        model, plain, divided = pair("mamba2", num_hidden_layers=6)
        most: list[int] = []

        def count(*_: Any) -> None:
            most.append(sum(block.whole for block in divided.blocks))

        def count_twice(module: nn.Module, args: Any, output: Any) -> None:
            count()
            first = output[0] if isinstance(output, tuple) else output
            if first.requires_grad:
                first.register_hook(count)

        for block in blocks_of(model):
            block.register_forward_hook(count_twice)
        found = {
            "a step": same(model, plain, step),
            "the next": same(model, plain, lambda m: step(m, 2)),
            "evaluation": torch.equal(evaluated(model), evaluated(plain)),
            "a step behind it": same(model, plain, step),
        }
        up_to = max(most)
        found |= {
            "two forwards first": same(model, plain, one_behind_the_other),
        }
        left = [block.whole for block in divided.blocks]
        divided.kept = 6
        found["all are kept"] = same(model, plain, step)
        frozen = [p for p in plain.parameters() if not p.requires_grad]
        share = sum(block.own.numel() for block in divided.blocks)
        blocks = sum(
            p.numel() * 4 for b in blocks_of(plain) for p in b.parameters() if not p.requires_grad
        )
        values = dict(plain.named_parameters())
        found["values"] = len(frozen) > 10 and all(
            torch.equal(whole(p), values[n]) for n, p in model.named_parameters()
        )
        divided.drop()
        absent = [p for p in model.parameters() if is_sharded(p)]
        found["as parameters"] = all(isinstance(p, nn.Parameter) for p in absent)
        return {
            "equal": found, "left": left, "most": up_to, "share": share / blocks,
            "memory": sum(b.flat.untyped_storage().nbytes() for b in divided.blocks),
            "read": message(lambda: absent[0] + 1),
            "state": type(next(iter(model.backbone.layers[3].state_dict().values()))).__name__,
        }  # fmt: skip


def checkpointed(place: Path) -> bool:
    """Blocks run again in backward, by transformers' checkpointing."""
    with process_group():
        model, plain, _ = pair("mamba2", num_hidden_layers=4)
        for each in (model, plain):
            checkpointing(each).enable_input_require_grads()
        return all(same(model, plain, lambda m, seed=seed: step(m, seed)) for seed in (1, 2))


def shared_blocks(place: Path) -> dict[str, Any]:
    """Zamba2's blocks share an attention layer: it stays whole."""
    with process_group():
        model, plain, divided = pair("zamba2")
        equal = all(same(model, plain, lambda m, seed=seed: step(m, seed)) for seed in (1, 2))
        held = [id(tensor) for block in divided.blocks for tensor in block.tensors]
        return {"equal": equal, "once": len(held) == len(set(held)), "divided": len(held)}


class Loop(nn.Module):
    """Blocks of which two call one module, and one that reads the weight of the head."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(8, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"own": nn.Linear(8, 8), "shared": shared}) for _ in range(4)
        )
        self.layers[3]["shared"] = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8, bias=False)
        self.layers[3]["shared"].weight = self.head.weight
        for block in self.layers:
            block.forward = lambda x, b=block: x + b["shared"](torch.tanh(b["own"](x)))
        self.requires_grad_(False)
        self.first = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x * self.first)
        return self.head(x).pow(2).mean()


def shared_modules(place: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    plain = Loop()
    plain(x).backward()
    torch.manual_seed(0)
    torch.randn(3, 8)
    model = Loop()
    with process_group():
        divided = shard_frozen(model, CPU)
        model(x).backward()
    assert plain.first.grad is not None
    assert model.first.grad is not None
    return {
        "equal": torch.equal(model.first.grad, plain.first.grad),
        "divided": [len(block.tensors) for block in divided.blocks],
    }


def refused(place: Path) -> list[str]:
    experts = nn.Module()
    experts.layers = nn.ModuleList([nn.Linear(2, 2)])
    experts.stack = QuantizedStack(1, quantize_linear(nn.Linear(64, 64), "nf4"))
    with process_group():
        return [
            message(lambda: shard_frozen(build("mamba2"), CPU, gather="pigeons")),
            message(lambda: shard_frozen(experts, CPU)),
        ]


CASES: dict[str, Callable[[Path], Any]] = {
    "divided steps": steps,
    "divided, checkpointed": checkpointed,
    "divided, shared blocks": shared_blocks,
    "divided, shared modules": shared_modules,
    "divided, refused": refused,
}
