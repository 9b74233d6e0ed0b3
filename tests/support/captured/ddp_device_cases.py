"""What two GPUs train with captured blocks; see ``test_capture_ddp_on_device.py``."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.models.mamba.modeling_mamba
import transformers.models.mamba2.modeling_mamba2  # noqa: F401  # before the processes fork
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from prodial_kernels import ProdialConfig, apply_prodial, capture
from support.captured.ddp_cases import ALIVE, STEPS, rank, trained
from support.models import build, randomise_adapters, token_ids

LAYERS = 4
OPTIONS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 64, "state_size": 32, "chunk_size": 64},
}


def compared(family: str, accumulation: int = 1, **options: Any) -> dict[str, Any]:
    """Captured steps in DDP beside plain ones, each process on its own GPU and rows."""
    # Upstream's kernels take one configuration each instead of tuning for minutes.
    os.environ["MAMBA_DETERMINISTIC"] = "1"
    device = torch.device("cuda", rank())
    torch.cuda.set_device(device)
    distributed.init_process_group("nccl", device_id=device)
    model = build(family, hidden_size=256, num_hidden_layers=LAYERS, **OPTIONS[family])
    model.to(torch.bfloat16)
    apply_prodial(model, ProdialConfig(r=8, lora_alpha=1))
    randomise_adapters(model)
    model.to(device)
    batches = [
        [token_ids(2, 96, 100 * rank() + 10 * n + k).to(device) for k in range(accumulation)]
        for n in range(STEPS)
    ]
    start = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    runs = []
    for plain in (copy.deepcopy(model), copy.deepcopy(model)):
        beside = DistributedDataParallel(plain, **options)
        ALIVE.append(beside)
        runs.append(trained(plain, beside, batches))
    expected, again = runs
    wrapped = DistributedDataParallel(model, **options)
    with capture(wrapped, norms=False) as captured:
        found = trained(model, wrapped, batches)
        said = str(captured)
    mine, wanted, repeated = (torch.cat([p.flatten() for p in one[1]]) for one in (found, *runs))
    others = [torch.empty_like(mine) for _ in range(2)]
    distributed.all_gather(others, mine)
    ALIVE.append(wrapped)
    size = (wanted - start).norm()
    return {
        "losses": _apart(found[0], expected[0]),
        "losses again": _apart(again[0], expected[0]),
        "updates": float((mine - wanted).norm() / size),
        "updates again": float((repeated - wanted).norm() / size),
        "alike": torch.equal(*others),
        "said": said,
    }


def _apart(found: list[float], right: list[float]) -> float:
    return max(abs(one / other - 1) for one, other in zip(found, right, strict=True))


CASES: dict[str, Callable[[Path], Any]] = {
    "mamba": lambda _: compared("mamba"),
    "mamba2, accumulated": lambda _: compared("mamba2", 2, gradient_as_bucket_view=True),
}
