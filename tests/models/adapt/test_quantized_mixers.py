"""Quantised projectors in the mixers' fused paths: as on dense ones, and never dense."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import ProdialConfig, ProdialLinear, apply_prodial, quantize_model
from prodial_kernels.models.vision_mamba.mixer import BidirectionalMamba
from prodial_kernels.quantization import FORMATS, QuantizedLinear
from support.mixers import cuda_stand_ins
from support.mixers import mamba_ssm_stand_ins as stand_ins
from support.mixers.adapted_mamba_ssm import cast
from support.mixers.mamba_ssm_stand_ins import Mamba, Mamba2, Mamba2Simple, Model
from support.models import randomise_adapters

pytestmark = pytest.mark.usefixtures("stand_in_kernels")

EVERY = ("in_proj", "out_proj", "x_proj", "dt_proj")
PROJECTORS = ("in_proj", "out_proj")
VISION = (*EVERY, "x_proj_b", "dt_proj_b")


def densified(model: nn.Module) -> nn.Module:
    """A copy on dense layers that hold what the quantised ones stand for."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedLinear):
                setattr(module, name, child.to_linear())
    return model


def unfused(model: nn.Module) -> nn.Module:
    """The definition in plain autograd, on separate kernels."""
    for module in model.modules():
        if isinstance(module, ProdialLinear):
            module.impl = "reference"
        for switch in ("use_fast_path", "use_mem_eff_path"):
            if hasattr(module, switch):
                setattr(module, switch, False)
        if isinstance(module, BidirectionalMamba):
            module.scan = "torch"
    return model


def adapted(
    build: Callable[[], nn.Module],
    format: str,
    quantised: tuple[str, ...],
    *,
    targets: tuple[str, ...] = PROJECTORS,
    impl: str = "torch",
    dtype: torch.dtype = torch.float64,
) -> tuple[nn.Module, nn.Module]:
    """A model on quantised layers, and the same adapters on the dense layers they stand for."""
    model = build()
    quantize_model(model, format, target_modules=quantised)
    model = cast(model, dtype)
    pair = (model, densified(model))
    for each in pair:
        apply_prodial(each, ProdialConfig(r=3, lora_alpha=6, target_modules=targets, impl=impl))
        randomise_adapters(each)
    return pair


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and every gradient, of ``x`` where it has one, in terms of the dense model's names."""
    x = x.detach().requires_grad_(x.is_floating_point())
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    return {"y": y.detach(), **gradients, **({} if x.grad is None else {"x": x.grad})}


def assert_accurate(model: nn.Module, dense: nn.Module, x: Tensor) -> None:
    """As the fused path on dense layers, every bit, and as the definition on separate kernels.

    How accurate the fused path is in 16 bits is for the tests of dense layers.
    """
    dtype = next(m.dtype for m in model.modules() if isinstance(m, QuantizedLinear))
    found = step(model, x)
    assert_equal(found, step(copy.deepcopy(dense), x))
    exact = step(unfused(dense).double(), x.double() if x.dtype == dtype else x)
    assert found.keys() == exact.keys()
    # In fp64 too, A, D and the bias of delta go through fp32 in the fused path.
    allowed = 1e-6 if dtype == torch.float64 else 0.1
    for name, tensor in found.items():
        error = (tensor.double() - exact[name]).norm() / exact[name].norm()
        assert error < allowed, f"{name}: relative error {error:.1e}"


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, t in found.items() if not torch.equal(t, expected[name])] == []


def ids(length: int = 7) -> Tensor:
    return torch.randint(11, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("mixer", "format", "quantised"),
    [
        *((Mamba, format, EVERY) for format in FORMATS),
        (Mamba, "nf4", PROJECTORS),
        (Mamba2, "nf4", PROJECTORS),
        (Mamba2Simple, "int8", PROJECTORS),
    ],
)
def test_fused_on_quantised_weights(
    mixer: type[nn.Module], format: str, quantised: tuple[str, ...], dtype: torch.dtype
) -> None:
    model, dense = adapted(lambda: Model(mixer), format, quantised, dtype=dtype)
    assert_accurate(model, dense, ids())


@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_on_every_projection(recompute: bool) -> None:
    model, dense = adapted(lambda: Model(Mamba, width=16), "nf4", EVERY, targets=EVERY)
    for each in (model, dense):
        for layer in each.layers:
            layer.mixer.prodial_recompute_xz = recompute
    assert_accurate(model, dense, ids())


@pytest.mark.parametrize("mixer", [Mamba, Mamba2])
def test_the_kernels_inside(mixer: type[nn.Module]) -> None:
    model, dense = adapted(
        lambda: Model(mixer, depth=1, width=32), "nf4", PROJECTORS, impl="triton",
        dtype=torch.float16,
    )  # fmt: skip
    assert_accurate(model, dense, ids(20))


@pytest.mark.parametrize(
    ("mixer", "calls"), [(Mamba, {"scan_fwd": 2, "scan_bwd": 2}), (Mamba2, {"fused": 2})]
)
def test_the_fused_path_is_the_one_that_runs(mixer: type[nn.Module], calls: dict[str, int]) -> None:
    model, _ = adapted(lambda: Model(mixer), "nf4", PROJECTORS)
    step(model, ids())
    counted = {**cuda_stand_ins.calls, "fused": len(stand_ins.fused_calls)}
    assert calls.items() <= counted.items()


def bidirectional(scan: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(BidirectionalMamba(32, d_state=4, scan=scan))


@pytest.mark.parametrize("targets", [PROJECTORS, VISION], ids=len)
def test_vision(targets: tuple[str, ...]) -> None:
    model, dense = adapted(lambda: bidirectional("cuda"), "nf4", VISION, targets=targets)
    assert_accurate(model, dense, torch.randn(2, 10, 32, dtype=torch.float64))
    assert cuda_stand_ins.calls["scan_bwd"] == 2 * 2  # both models, both directions


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(
    "build",
    [
        lambda: Model(Mamba, width=24), lambda: Model(Mamba2, width=24),
        lambda: nn.Sequential(nn.Embedding(11, 32), bidirectional("cuda")),
    ],
    ids=["mamba", "mamba2", "vision"],
)  # fmt: skip
def test_no_dense_weight_is_kept(build: Callable[[], nn.Module], enabled: bool) -> None:
    names = VISION if isinstance(build(), nn.Sequential) else EVERY
    if "Mamba2" in str([type(m) for m in build().modules()]):
        names = PROJECTORS
    model, _ = adapted(build, "int8", names)
    shapes = set()
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            shapes.add((module.out_features, module.in_features))
        if isinstance(module, ProdialLinear):
            module.enable_adapter(enabled)
    first = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    first.weight.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(ids(29))

    def dense(tensors: list[object]) -> list[tuple[int, ...]]:
        gc.collect()
        return [
            tuple(t.shape)
            for t in tensors
            if type(t) is Tensor and t.shape in shapes and t.is_floating_point() and not t.is_meta
        ]

    assert kept
    assert dense(kept) == []
    assert dense(gc.get_objects()) == []
    y.sum().backward()
    assert first.weight.grad is not None
    kept.clear()
    assert dense(gc.get_objects()) == []
