"""Models divided between two processes on a device; see ``test_sharding_on_device.py``."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.models.mamba.modeling_mamba
import transformers.models.mamba2.modeling_mamba2  # noqa: F401  # before the processes fork
from torch import Tensor, distributed, nn

from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.checkpoint.sharded import is_sharded, whole
from prodial_kernels.training.distributed.sharding import shard_frozen
from support.models import build, randomise_adapters, token_ids

LAYERS = 6
OPTIONS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 64, "state_size": 32, "chunk_size": 64},
}


def gradients(model: nn.Module, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return float(loss), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def compared(family: str, gather: str) -> dict[str, Any]:
    """Steps of a divided model beside those of a copy that is whole."""
    os.environ["MAMBA_DETERMINISTIC"] = "1"
    rank, here = int(os.environ["RANK"]), torch.cuda.device_count()
    if gather != "copies" and here < 2:
        return {"skipped": "gloo gathers nothing on a device"}
    # Two processes of one GPU reach each other's memory too.
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    device = torch.device("cuda", rank % here)
    torch.cuda.set_device(device)
    if here > 1:
        distributed.init_process_group("nccl", device_id=device)
    else:
        distributed.init_process_group("gloo")
    model = build(family, hidden_size=256, num_hidden_layers=LAYERS, **OPTIONS[family])
    model.to(torch.bfloat16)
    apply_prodial(model, ProdialConfig(r=8, lora_alpha=1))
    randomise_adapters(model)
    plain = copy.deepcopy(model).to(device)
    divided = shard_frozen(model, device, gather=gather)
    absent = sum(is_sharded(p) for p in model.parameters())
    far, losses = 0.0, 0.0
    for seed in (1, 2, 3):
        ids = token_ids(2, 96, seed).to(device)
        loss, expected = gradients(plain, ids)
        mine, found = gradients(model, ids)
        losses = max(losses, abs(mine / loss - 1))
        assert found.keys() == expected.keys()
        far = max(
            far,
            *(float((found[n] - g).norm() / g.norm().clamp(min=1e-6)) for n, g in expected.items()),
        )
        with torch.no_grad():
            left, right = (m(input_ids=ids, use_cache=False).logits for m in (model, plain))
        losses = max(losses, float((left - right).float().norm() / right.float().norm()))
    values = all(
        torch.equal(whole(p), dict(plain.named_parameters())[n])
        for n, p in model.named_parameters()
    )
    divided.drop()
    still = sum(block.flat.untyped_storage().nbytes() for block in divided.blocks)
    kept = sum(block.own.numel() for block in divided.blocks)
    distributed.barrier()
    distributed.destroy_process_group()
    return {
        "losses": losses, "gradients": far, "values": values, "absent": absent, "still": still,
        "kept": kept, "said": str(divided),
    }  # fmt: skip


CASES: dict[str, Callable[[Path], Any]] = {
    "copies, mamba2": lambda _: compared("mamba2", "copies"),
    "collective, mamba2": lambda _: compared("mamba2", "collective"),
    "auto, mamba2": lambda _: compared("mamba2", "auto"),
}
