"""A base model is recognised on a GPU by what was written on a CPU, and the other way round."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from prodial_kernels import (
    ProdialConfig,
    apply_prodial,
    load_adapter,
    quantize_model,
    save_adapter,
)
from prodial_kernels.checkpoint import AdapterError
from prodial_kernels.checkpoint.hashing import hash_tensor
from support.models import build, randomise_adapters

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64], ids=str
)
@pytest.mark.parametrize("shape", [(), (1,), (5, 7, 11), (1025,), (5000, 1024)])
def test_the_hash_is_the_cpus(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 250, shape).to(dtype)
    assert hash_tensor(tensor.cuda()) == hash_tensor(tensor)
    if len(shape) == 2:
        assert hash_tensor(tensor.cuda().t().contiguous().t()) == hash_tensor(tensor)


@pytest.mark.parametrize("format", [None, "nf4", "int8", "fp8"])
def test_an_adapter_goes_from_one_to_the_other(format: str | None, tmp_path: Path) -> None:
    def base(device: str) -> torch.nn.Module:
        model = build("mamba2").bfloat16()
        if format is not None:
            quantize_model(model, format)
        return model.to(device)

    for there, here in (("cuda", "cpu"), ("cpu", "cuda")):
        model = base(there)
        apply_prodial(model, ProdialConfig(r=2))
        randomise_adapters(model.cpu())
        save_adapter(model.to(there), tmp_path / there)
        load_adapter(base(here), tmp_path / there)
        other = base(here)
        with torch.no_grad():
            next(other.parameters()).view(-1)[7] += 1
        with pytest.raises(AdapterError, match="other weights"):
            load_adapter(other, tmp_path / there)


def test_it_reads_memory_at_speed_and_copies_none() -> None:
    tensor = torch.randn(512, 2**20, device="cuda", dtype=torch.bfloat16)
    hash_tensor(tensor)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    hash_tensor(tensor)
    seconds = time.perf_counter() - start
    assert torch.cuda.max_memory_allocated() - before < 0.2 * tensor.nbytes
    # A copy to the host of 1 GiB takes some tenths of a second, and hashing it there another.
    assert seconds < 0.25
