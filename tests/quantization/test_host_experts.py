"""Experts in the host's memory: the same numbers, few of them on the device, and the plan of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import ProdialConfig, apply_prodial, quantize_linear, quantize_model
from prodial_kernels.models.loading.load import ModelError, load_model
from prodial_kernels.quantization import FORMATS
from prodial_kernels.quantization.modules import routing
from prodial_kernels.quantization.modules.counting import host_bytes, stored_bytes
from prodial_kernels.quantization.modules.experts import QuantizedExperts, QuantizedStack
from prodial_kernels.quantization.modules.host_experts import HostStack
from prodial_kernels.training.config import ConfigError, FinetuneConfig
from prodial_kernels.training.memory.peak import Job
from prodial_kernels.training.memory.plan import plan_memory
from prodial_kernels.training.memory.shapes import describe_model
from support.models import build, randomise_adapters, token_ids, training_step

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    # These models have none.
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr("prodial_kernels.models.loading.load.check_tokenizer", lambda *_: None)


def stacks(format: str) -> list[QuantizedStack]:
    torch.manual_seed(0)
    layers = [quantize_linear(nn.Linear(96, 40, bias=False), format) for _ in range(6)]
    made = [QuantizedStack(6, layers[0]), HostStack(6, layers[0])]
    for stack in made:
        for index, layer in enumerate(layers):
            stack.put(index, layer)
    return made


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_weights(format: str) -> None:
    here, away = stacks(format)
    assert torch.equal(away.dequantize(), here.dequantize())
    assert away.packed_bytes == here.packed_bytes == stored_bytes(format, 40, 96, 6)
    assert away.device_bytes == away.packed_bytes - 6 * host_bytes(format, 40, 96)
    known = [0, 1, 2, 4]
    out = torch.empty(4, 40, 96)
    away.prefetch(known)
    away.unpack_some(torch.tensor(known), known, out)
    assert torch.equal(out, here.dequantize()[known])
    # Asked for without notice too, and cast.
    cast = away.to(torch.bfloat16)
    half = torch.empty(1, 40, 96, dtype=torch.bfloat16)
    cast.unpack_some(torch.tensor([5]), [5], half)
    assert torch.equal(half[0], here.to(torch.bfloat16)[5].dequantize())
    other = stacks(format)[1]
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(away.state_dict())
    assert torch.equal(other.float().dequantize(), away.float().dequantize())


@pytest.mark.parametrize("name", ["nemotron_h", "granitemoehybrid"])
def test_a_model_with_experts_on_the_host(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "GROUP_BYTES", 1)
    seen: list[list[int]] = []
    original = HostStack.prefetch

    def watched(self: HostStack, known: list[int]) -> None:
        seen.append(known)
        original(self, known)

    monkeypatch.setattr(HostStack, "prefetch", watched)
    build(name, num_local_experts=4).save_pretrained(tmp_path)
    options: dict[str, Any] = {
        "device": CPU, "dtype": torch.float32, "quantize": "nf4", "quantize_modules": "all",
    }  # fmt: skip
    steps = []
    for on_host in (False, True):
        model = load_model(str(tmp_path), **options, experts_on_host=on_host).model
        kinds = {type(s) for m in model.modules() if isinstance(m, QuantizedExperts)
                 for s in m.stacks.values()}  # fmt: skip
        assert kinds == {HostStack if on_host else QuantizedStack}
        apply_prodial(model, ProdialConfig(r=2))
        randomise_adapters(model)
        steps.append(training_step(model, token_ids()))
    assert torch.equal(steps[0].logits, steps[1].logits)
    for key, gradient in steps[0].gradients.items():
        found = steps[1].gradients[key]
        assert gradient is not None
        assert found is not None
        assert torch.equal(found, gradient)
    # Each expert that has tokens once a product, and none twice in a row.
    assert seen
    assert all(len(known) == 1 for known in seen)


def test_it_is_for_mixtures(tmp_path: Path) -> None:
    build("mamba").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="experts_on_host"):
        load_model(
            str(tmp_path), device=CPU, dtype=torch.float32, quantize="nf4",
            quantize_modules="all", experts_on_host=True,
        )  # fmt: skip
    with pytest.raises(ConfigError, match="make it 'all'"):
        FinetuneConfig(experts="host", quantize="nf4")


def test_the_plan_streams_experts_where_nothing_else_fits() -> None:
    model = build("nemotron_h", n_routed_experts=64, moe_intermediate_size=512)
    apply_prodial(model, ProdialConfig(r=2))
    shape = describe_model(model, kernels=True)

    def plan(experts: str, budget: int | None = None, modules: str = "all") -> Any:
        job = Job(1, 16, 4, quantize="nf4", quantize_modules=modules, experts=experts)
        return plan_memory(shape, job, budget=budget, strict=False)

    here, away = plan("device"), plan("host")
    experts = 2 * 64 * host_bytes("nf4", 512, 16)
    assert (here.streamed, away.streamed) == (0, experts)
    assert "experts in the host's memory" in str(away)
    assert "experts in the host's memory" not in str(here)
    assert plan("auto").experts == "device"
    # Nothing but the experts makes room.
    least = plan("auto", budget=1)
    assert least.experts in ("device", "host")
    assert plan("auto", modules="projectors", budget=1).streamed == 0


def test_bytes_on_the_device_are_counted_beforehand() -> None:
    model = build("nemotron_h")
    quantize_model(model, "nf4", target_modules="all")
    stack: Tensor | Any = next(m for m in model.modules() if isinstance(m, QuantizedStack))
    n, k = stack.out_features, stack.in_features
    away = HostStack(len(stack), stack[0])
    assert len(stack) * host_bytes("nf4", n, k) == away.packed_bytes - away.device_bytes
