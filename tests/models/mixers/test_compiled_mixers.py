"""Adapted mixers inside torch.compile: one graph, and the results of eager steps."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from prodial_kernels import ProdialConfig, ProdialLinear, apply_prodial
from prodial_kernels.models.mixers.scan_function import differentiable_scan
from prodial_kernels.models.mixers.selective_scan import BACKWARD, FORWARD, scan_operands
from prodial_kernels.models.vision_mamba.mixer import BidirectionalMamba
from prodial_kernels.quantization.convert import quantize_linear
from support.mixers import cuda_stand_ins, stand_ins
from support.mixers.adapted_families import adapt
from support.mixers.adapted_mamba_ssm import adapted, cast, step
from support.mixers.mamba_ssm_stand_ins import Mamba
from support.models import FAMILIES, randomise_adapters, token_ids

EVERY = ProdialConfig(r=2, target_modules=("in_proj", "out_proj", "x_proj", "dt_proj"))


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cuda_stand_ins.install(monkeypatch)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def losses_and_gradients(model: nn.Module, run: Any, ids: Tensor) -> dict[str, Tensor]:
    """Of two steps, so that the second one takes the graph that the first one made."""
    found = {}
    for number in (0, 1):
        model.zero_grad()
        torch.manual_seed(number)
        loss = run(input_ids=ids.roll(number, 1), labels=ids, use_cache=False).loss
        loss.backward()
        found[f"loss {number}"] = loss.detach()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert parameter.grad.count_nonzero() > 0, name
                found[f"{name} {number}"] = parameter.grad
    return found


def assert_compiles(model: nn.Module, length: int = 8, **close: float) -> None:
    """In one graph without a break, forward and backward, with the results of eager steps."""
    ids = token_ids(length=length)
    backend = CompileCounterWithBackend("aot_eager")
    expected = losses_and_gradients(model, model, ids)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(losses_and_gradients(model, compiled, ids), expected, **close)
    assert backend.frame_count == 1


def test_mamba_on_its_kernels() -> None:
    config = ProdialConfig(r=3, lora_dropout=0.5, block_size=4)
    assert_compiles(adapt("mamba", config, num_hidden_layers=1), rtol=0, atol=0)
    # Two steps, eager and compiled: the scan once, the convolution again in backward.
    assert cuda_stand_ins.calls == {"scan_fwd": 4, "conv_fwd": 8, "scan_bwd": 4, "conv_bwd": 4}


def test_quantised_projections() -> None:
    config = ProdialConfig(r=3, target_modules=("in_proj",))
    model = adapt("mamba", config, num_hidden_layers=1)
    mixer: Any = next(m for m in model.modules() if hasattr(m, "x_proj"))
    for parent, name in ((mixer.in_proj, "base_layer"), (mixer, "x_proj"), (mixer, "out_proj")):
        setattr(parent, name, quantize_linear(getattr(parent, name), "int8"))
    assert_compiles(model)
    assert cuda_stand_ins.calls["scan_bwd"] == 4


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_trainer(tmp_path: Path) -> None:
    """transformers' ``Trainer(torch_compile=True)``, here under autocast."""
    from transformers import Trainer, TrainingArguments

    found = []
    for number, compiles in enumerate(({}, {"torch_compile_backend": "aot_eager"})):
        counters.clear()
        model = adapt("mamba", num_hidden_layers=1)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(number)), per_device_train_batch_size=2, max_steps=3,
            use_cpu=True, bf16=True, report_to=[], logging_steps=1, disable_tqdm=True, seed=1,
            save_strategy="no", torch_compile=bool(compiles), **compiles,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in token_ids(batch=6, length=8)]
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        found.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(found[0]) == 3
    torch.testing.assert_close(*map(torch.tensor, found), rtol=1e-3, atol=0)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert cuda_stand_ins.calls["scan_bwd"] == 6


def test_the_kernels_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels, which the interpreter runs, behind the operators that a graph holds."""
    model = adapt("mamba", ProdialConfig(r=3, impl="triton"), num_hidden_layers=1).half()
    for layer in model.modules():
        if isinstance(layer, ProdialLinear):
            for _, parameter in layer.adapter_parameters():
                parameter.data = parameter.data.float()
    assert_compiles(model, rtol=1e-2, atol=1e-3)


def test_mamba2_where_upstreams_function_can_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt("mamba2", num_hidden_layers=1)
    modeling = sys.modules[type(model).__module__]
    stand_in = stand_ins.mamba2_split_conv1d_scan_combined
    monkeypatch.setattr(modeling, FAMILIES["mamba2"].fused, stand_in)
    assert_compiles(model, length=3)


def test_mamba_ssm() -> None:
    model = cast(adapted(Mamba), torch.float32)
    ids = torch.randint(0, 11, (2, 8), generator=torch.Generator().manual_seed(1))
    expected = step(model, ids)
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(model, ids), expected)
    assert cuda_stand_ins.calls["scan_bwd"] == 4


@pytest.mark.parametrize(("direction", "every"), [(FORWARD, True), (BACKWARD, False)])
def test_the_scans_operator_is_what_it_says(direction: Any, every: bool) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(BidirectionalMamba(6, d_state=4))
    if every:
        apply_prodial(module, ProdialConfig(r=2, target_modules=("x_proj", "dt_proj")))
        randomise_adapters(module)
    xz = torch.randn(2, 24, 10, requires_grad=True)
    operands, options = scan_operands(module[0], xz.mT, direction)
    tensors = [None if t is None else t.detach() for t in operands.flat()]
    tensors[0] = tensors[0].requires_grad_()
    torch.library.opcheck(
        torch.ops.prodial_kernels.mamba_scan.default,
        (xz, *tensors, *options.x_proj[:4], *options.dt_proj[:4], direction.reverse),
    )


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_both_directions(direction: Any) -> None:
    torch.manual_seed(0)
    module = BidirectionalMamba(6, d_state=4)
    xz = torch.randn(2, 24, 10, requires_grad=True)

    def scanned(xz: Tensor) -> Tensor:
        operands, options = scan_operands(module, xz.mT, direction)
        return differentiable_scan(xz, operands, options, reverse=direction.reverse)

    weights = torch.randn(2, 12, 10)
    trained = [p for p in module.parameters() if p.requires_grad]
    compiled = torch.compile(copy.copy(scanned), backend="aot_eager", fullgraph=True)
    found = []
    for function in (scanned, compiled):
        y = function(xz)
        gradients = torch.autograd.grad(y, [xz, *trained], weights, allow_unused=True)
        found.append([y, *[g for g in gradients if g is not None]])
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert len(found[0]) > 6
