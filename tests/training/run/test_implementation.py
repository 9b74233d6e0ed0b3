"""What a run says of the implementation that it takes, and ``impl`` from the options on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prodial_kernels import ProdialConfig, ProdialLinear, apply_prodial
from prodial_kernels.training import FinetuneConfig
from prodial_kernels.training.adapted import load_adapted
from prodial_kernels.training.options import ConfigError
from prodial_kernels.training.run.implementation import (
    check_implementation,
    implementation_of,
    set_implementation,
)
from support.tiny_run import run


def adapted(impl: str = "auto") -> torch.nn.Module:
    model = torch.nn.ModuleDict({"in_proj": torch.nn.Linear(6, 4)})
    apply_prodial(model, ProdialConfig(r=2, target_modules=("in_proj",), impl=impl))
    return model


def test_what_is_said() -> None:
    assert implementation_of(torch.nn.Linear(2, 3)) is None
    assert implementation_of(adapted()) == "torch on cpu"
    model = adapted("reference")
    assert implementation_of(model) == "reference on cpu, as asked for"
    set_implementation(model, "torch")
    assert implementation_of(model) == "torch on cpu, as asked for"


def test_the_kernels_are_refused_where_they_cannot_run() -> None:
    cpu = torch.device("cpu")
    for impl in ("auto", "torch", "reference"):
        check_implementation(impl, cpu, torch.float32)
    with pytest.raises(ConfigError, match="impl 'triton' cannot run: the model has dtype"):
        check_implementation("triton", cpu, torch.float32)


def test_options() -> None:
    assert FinetuneConfig(r=2, impl="reference").adapter().impl == "reference"
    assert FinetuneConfig(r=2).adapter().impl == "auto"
    with pytest.raises(ConfigError, match="impl must be one of"):
        FinetuneConfig(impl="cuda")
    with pytest.raises(ConfigError, match=r"impl says how .* method 'full' adapts none"):
        FinetuneConfig(method="full", impl="torch")


def test_a_run_and_its_adapter(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="impl 'triton' cannot run"):
        run(place, tmp_path / "run", impl="triton")
    assert not (tmp_path / "run").exists()
    result = run(place, tmp_path / "run", impl="reference", steps=2, progress=True)
    assert result.implementation == "reference on cpu, as asked for"
    assert "projectors run by reference on cpu, as asked for" in capsys.readouterr().err
    for asked, expected in ((None, "reference"), ("torch", "torch")):
        loaded = load_adapted(adapter=result.adapter_dir, device="cpu", impl=asked)
        layers = [m for m in loaded.model.modules() if isinstance(m, ProdialLinear)]
        assert {layer.impl for layer in layers} == {expected}
