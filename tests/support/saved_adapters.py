"""A small model, adapted and trained, to save adapters of and to load them into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from prodial_kernels import ProdialConfig, apply_prodial, load_adapter
from prodial_kernels.checkpoint import AdapterError
from prodial_kernels.checkpoint.files import TENSOR_FILE, read_files, write_files
from prodial_kernels.checkpoint.peft_form import file_name, plain_name

CONFIG = ProdialConfig(r=4, n_blocks={"in_proj": 4, "out_proj": 24}, modules_to_save=("head",))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(12, 48, bias=False)
        self.out_proj = nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(value * torch.sigmoid(gate))


class Model(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList([Mixer(), Mixer()])
        self.head = nn.Sequential(nn.Linear(12, 3), nn.BatchNorm1d(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def trained(config: ProdialConfig = CONFIG, seed: int = 1, model: nn.Module | None = None) -> Any:
    """An adapted model whose every trained value moved, as after training."""
    model = Model() if model is None else model
    apply_prodial(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def state(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Everything of a model that loading could change, down to the bits and flags."""
    described: dict[str, tuple[Any, ...]] = {
        name: (type(module), module.training) for name, module in model.named_modules()
    }
    for name, parameter in model.named_parameters():
        described[name] = (parameter.requires_grad, parameter.dtype, parameter.tolist())
    for name, buffer in model.named_buffers():
        described[name] = (buffer.dtype, buffer.tolist())
    return described


def expect_refusal(directory: Path, match: str, model: nn.Module | None = None) -> None:
    for target in [Model(), trained(seed=3)] if model is None else [model]:
        before = state(target)
        with pytest.raises(AdapterError, match=match):
            load_adapter(target, directory)
        assert state(target) == before


def rewrite(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the configuration file and keep its checksum right, as another program might."""
    header, payload = read_files(directory)
    change(header)
    write_files(directory, header, payload)


def rewrite_tensors(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors, and the list of them, and every checksum."""
    header, _ = read_files(directory)
    tensors = {plain_name(n): t for n, t in load_file(directory / TENSOR_FILE).items()}
    change(tensors)
    header["tensors"] = {
        name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
        for name, t in tensors.items()
    }
    write_files(directory, header, save({file_name(n): t for n, t in tensors.items()}))
