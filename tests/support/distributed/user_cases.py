"""Adapters in two processes of somebody's own training loop; see ``test_users_loops.py``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, utils  # noqa: F401  # before the processes fork
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard

from prodial_kernels import (
    ProdialConfig,
    apply_prodial,
    load_adapter,
    merge_prodial,
    save_adapter,
)
from prodial_kernels.checkpoint import model_fingerprint
from support.tiny_model import tiny_mamba2

CONFIG = ProdialConfig(r=4, n_blocks={"in_proj": 4, "out_proj": 8})
Difference = dict[str, float]


@contextmanager
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo")
    yield
    distributed.destroy_process_group()


def adapted() -> Any:
    """The tiny Mamba-2, with an adapter that does something."""
    model = tiny_mamba2()
    apply_prodial(model, CONFIG)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prodial" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def tokens() -> Tensor:
    return torch.randint(0, 264, (4, 24), generator=torch.Generator().manual_seed(2))


def own() -> Tensor:
    """The half of the batch that is this process's."""
    return tokens().chunk(2)[int(os.environ["RANK"])]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            whole = getattr(parameter.grad, "full_tensor", lambda p=parameter: p.grad)()
            found[name.removeprefix("module.")] = whole.detach().clone()
    return found


def expected() -> dict[str, Tensor]:
    """Gradients of one process with the whole batch."""
    model = adapted()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    return gradients(model)


def differences(found: dict[str, Tensor]) -> Difference:
    right = expected()
    assert found.keys() == right.keys()
    assert len(found) == 16
    return {n: float((found[n] - right[n]).norm() / right[n].norm()) for n in right}


def ddp(place: Path) -> Difference:
    with process_group():
        model = nn.parallel.DistributedDataParallel(adapted())
        model(input_ids=own(), labels=own()).loss.backward()
        return differences(gradients(model))


def with_accelerate(place: Path) -> Difference:
    accelerator = Accelerator(cpu=True)
    model = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert accelerator.num_processes == 2
    accelerator.backward(model(input_ids=own(), labels=own()).loss)
    found = gradients(model)
    accelerator.end_training()
    return differences(found)


def divided(*, whole_adapters: bool) -> Any:
    model = adapted()
    kept = {p for p in model.parameters() if p.requires_grad} if whole_adapters else None
    for block in model.backbone.layers:
        fully_shard(block, ignored_params=kept)
    return fully_shard(model, ignored_params=kept)


def fsdp(place: Path) -> Difference:
    with process_group():
        model = divided(whole_adapters=False)
        model(input_ids=own(), labels=own()).loss.backward()
        return differences(gradients(model))


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def fsdp_on_disk(place: Path) -> dict[str, Any]:
    """Save from, and load into, models whose adapters are divided, and kept whole."""
    with process_group():
        result: dict[str, Any] = {}
        plain = adapted()
        for name, whole_adapters in (("divided", False), ("kept", True)):
            model = divided(whole_adapters=whole_adapters)
            assert model_fingerprint(model) == model_fingerprint(plain)
            save_adapter(model, place / name, base_model="tiny")
            result[f"{name} there"] = (place / name / "adapter_config.json").exists()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.zero_()
            load_adapter(model, place / name)
            ours, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
            result[name] = all(
                torch.equal(getattr(p, "full_tensor", lambda p=p: p)(), theirs[n])
                for n, p in ours.items()
            )
        save_adapter(plain, place / f"plain{os.environ['RANK']}", base_model="tiny")
        result["merge"] = message(lambda: merge_prodial(model))
        base = tiny_mamba2()
        fully_shard(base)
        result["apply"] = message(lambda: apply_prodial(base, CONFIG))
        result["load"] = message(lambda: load_adapter(base, place / "kept"))
        return result


def zero(place: Path) -> dict[str, Any]:
    """DeepSpeed's three stages: gradients, then an adapter saved from and loaded into an engine."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.init_distributed("gloo", verbose=False)
    result: dict[str, Any] = {}
    for stage in (1, 2, 3):
        model = adapted()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        partition = {"stage": stage, "stage3_param_persistence_threshold": 0}
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(trained.values(), lr=0.0),
            config={
                "train_batch_size": 4, "train_micro_batch_size_per_gpu": 2,
                "zero_optimization": partition, "zero_allow_untested_optimizer": True,
            },
        )  # fmt: skip
        engine.backward(engine(input_ids=own(), labels=own()).loss)
        result[f"gradients {stage}"] = differences(
            {name: safe_get_full_grad(p).clone() for name, p in trained.items()}
        )
        engine.step()
        folder = place / f"zero{stage}"
        if stage == 3:
            result["save"] = message(partial(save_adapter, model, folder))
            result["load"] = message(partial(load_adapter, model, place / "zero2"))
            with deepspeed.zero.GatheredParameters(list(model.parameters())):
                if distributed.get_rank() == 0:
                    save_adapter(model, folder, base_model="tiny")
            continue
        if distributed.get_rank() == 0:
            save_adapter(model, folder, base_model="tiny")
        before = {name: p.detach().clone() for name, p in trained.items()}
        with torch.no_grad():
            for parameter in trained.values():
                parameter.zero_()
        distributed.barrier()
        load_adapter(model, folder)
        engine.backward(engine(input_ids=own(), labels=own()).loss)
        engine.step()
        result[f"kept {stage}"] = all(p.equal(before[name]) for name, p in trained.items())
    return result


CASES = {
    "ddp": ddp,
    "accelerate": with_accelerate,
    "fsdp": fsdp,
    "fsdp_on_disk": fsdp_on_disk,
}
if find_spec("deepspeed"):
    CASES["zero"] = zero
