"""One direction of a Vision Mamba mixer: PyTorch against the recurrence, CUDA against PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import ProdialConfig, apply_prodial
from prodial_kernels.models.mixers.selective_scan import BACKWARD, FORWARD, Direction
from prodial_kernels.models.mixers.vim_scan import directed_scan, selective_scan
from prodial_kernels.models.vision_mamba.mixer import BidirectionalMamba
from support.mixers import cuda_stand_ins
from support.models import randomise_adapters

WIDTH, TOKENS = 6, 10
DIRECTIONS = [FORWARD, BACKWARD]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 50])
def test_torch_scan_is_the_recurrence(length: int) -> None:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn.requires_grad_()

    u, delta, B, C = normal(2, 3, length), normal(2, 3, length), *[normal(2, 4, length)] * 2
    # Decays from nearly 1 to nearly 0: what divides by one of them overflows.
    A = normal(3, 4).abs() * torch.tensor([1e-3, 1.0, 30.0, 1e3], dtype=torch.float64)
    steps = torch.nn.functional.softplus(delta)
    result = selective_scan(u, steps, -A, B, C)
    zero = torch.zeros(3, dtype=torch.float64)
    expected, _ = cuda_stand_ins.scan(u, delta, -A, B[:, None], C[:, None], zero, zero)
    torch.testing.assert_close(result, expected)
    weights = normal(2, 3, length).detach()
    gradients = [torch.autograd.grad(y, (u, delta, B, C), weights) for y in (result, expected)]
    torch.testing.assert_close(*gradients)


def mixer(config: ProdialConfig | None = None, scan: str = "auto") -> BidirectionalMamba:
    torch.manual_seed(0)
    module = nn.Sequential(BidirectionalMamba(WIDTH, d_state=4, scan=scan))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    if config is not None:
        apply_prodial(module, config)
        randomise_adapters(module)
    return module[0]


def packed(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4 * WIDTH, TOKENS, generator=generator).to(dtype)


def run(
    module: BidirectionalMamba, direction: Direction, scan: str, dtype: torch.dtype, xz: bool = True
) -> dict[str, Tensor]:
    """Output, and the gradients of xz and of every trained parameter of the direction."""
    module, x = module.to(dtype), packed(dtype).requires_grad_(xz)
    y = directed_scan(module, x, direction, scan)
    # As it comes from out_proj: transposed.
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y.mT).mT)
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **({"xz": x.grad} if xz else {}), **gradients}


def assert_near(result: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Within fp32's rounding: the stand-in goes step by step, the other way chunk by chunk."""
    assert result.keys() == exact.keys()
    for name, tensor in result.items():
        error = (tensor - exact[name]).norm() / exact[name].norm()
        assert error < 3e-6, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("direction", DIRECTIONS, ids=("forward", "backward"))
def test_cuda_path_equals_torch(direction: Direction, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_stand_ins.install(monkeypatch)
    result = run(mixer(), direction, "cuda", torch.float32)
    assert dict(cuda_stand_ins.calls) == {
        "conv_fwd": 2, "scan_fwd": 1, "scan_bwd": 1, "conv_bwd": 1,
    }  # fmt: skip
    parts = 7  # conv1d and dt_proj have two parameters each, x_proj, A and D one
    assert len(result) == 2 + parts
    assert_near(result, run(mixer(), direction, "torch", torch.float64))


@pytest.mark.parametrize("direction", DIRECTIONS, ids=("forward", "backward"))
@pytest.mark.parametrize(
    "trained", ["", "x_proj", "dt_proj", "conv1d.weight", "A_", "D", "dt_proj.bias"]
)
def test_only_what_is_asked_for_is_computed(
    direction: Direction, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each group of parameters alone, without a gradient of xz, and xz alone."""

    def frozen() -> BidirectionalMamba:
        module = mixer()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(bool(trained) and name.startswith(trained))
        return module

    cuda_stand_ins.install(monkeypatch)
    if trained == "A_" and direction is BACKWARD:
        trained = "A_b_log"
    elif trained and direction is BACKWARD:
        first, *rest = trained.split(".")
        trained = ".".join([f"{first}_b", *rest])
    result = run(frozen(), direction, "cuda", torch.float32, xz=not trained)
    assert len(result) >= 2
    convolves = not trained or trained.startswith("conv1d")
    assert cuda_stand_ins.calls["conv_bwd"] == convolves
    assert_near(result, run(frozen(), direction, "torch", torch.float64, xz=not trained))


@pytest.mark.parametrize("direction", DIRECTIONS, ids=("forward", "backward"))
def test_adapted_inner_projections(direction: Direction, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ProdialConfig(
        r=3, lora_alpha=6, target_modules=("x_proj", "x_proj_b", "dt_proj", "dt_proj_b")
    )
    cuda_stand_ins.install(monkeypatch)
    result = run(mixer(config), direction, "cuda", torch.float32)
    expected = run(mixer(config), direction, "torch", torch.float32)
    assert len(result) == 2 + 2 * 4
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_both_directions_keep_one_xz(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_stand_ins.install(monkeypatch)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    xz = packed().requires_grad_()
    module = mixer().requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = directed_scan(module, xz, FORWARD, "cuda") + directed_scan(module, xz, BACKWARD, "cuda")
    own = {parameter.data_ptr() for parameter in module.parameters()}
    storages = {t.data_ptr(): t.numel() for t in kept if t.data_ptr() not in own}
    # xz; per direction the ungated output, x_proj's output, the states, A.
    outputs, rest = y.numel(), (TOKENS * (1 + 8) + y.shape[1] * 8) * 2 + y.shape[1] * 4
    assert sum(storages.values()) <= xz.numel() + 2 * (outputs + rest)
    assert sum(t.shape == xz.shape for t in kept) == 2
    assert len({t.data_ptr() for t in kept if t.shape == xz.shape}) == 1


def test_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_stand_ins.install(monkeypatch)
    xz = packed().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = directed_scan(mixer(), xz, FORWARD, "cuda")
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert xz.grad.dtype is torch.float32
    exact = directed_scan(mixer(), packed(), FORWARD, "torch")
    assert (y - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize(
    ("scan", "message"),
    [
        ("triton", r"scan must be one of 'auto', 'cuda', 'torch', got 'triton'"),
        ("cuda", 'needs causal-conv1d and mamba-ssm; install them .* or pass scan="torch"'),
    ],
)
def test_errors(scan: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prodial_kernels.models.mixers.vim_scan.kernels_available", lambda: False)
    with pytest.raises((ValueError, RuntimeError), match=message):
        directed_scan(mixer(), packed(), FORWARD, scan)


def test_reference_projections_run_in_torch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_stand_ins.install(monkeypatch)
    config: Any = ProdialConfig(r=3, target_modules=("x_proj",), impl="reference")
    module = mixer(config)
    assert directed_scan(module, packed(), FORWARD, "torch").shape == (2, 2 * WIDTH, TOKENS)
    with pytest.raises(ValueError, match=r'x_proj has impl="reference"'):
        directed_scan(module, packed(), FORWARD, "cuda")
