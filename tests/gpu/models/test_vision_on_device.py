"""``VisionMamba`` on the real kernels of mamba-ssm and causal-conv1d, against its PyTorch scan."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from prodial_kernels import ProdialConfig, VisionMamba, apply_prodial, merge_prodial
from prodial_kernels.models.vision_mamba.mixer import BidirectionalMamba
from prodial_kernels.models.vision_mamba.norm import AddRMSNorm
from support import mamba_ssm_loaded  # noqa: F401
from support.captured.on_device import captured
from support.models import randomise_adapters

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("weight_is_not_read")]

DEVICE = "cuda"
CONFIG = ProdialConfig(r=8, lora_alpha=4, block_size={"in_proj": 12, "out_proj": 24})
VIM_TINY, TOKENS = 192, 197


def mixer(dtype: torch.dtype, scan: str, adapted: bool) -> nn.Module:
    """One mixer of Vim-T, with the same 16-bit weights in every dtype; all of it trains, or the
    adapters do."""
    torch.manual_seed(0)
    parent = nn.Sequential(BidirectionalMamba(VIM_TINY, scan=scan))
    with torch.no_grad():
        for parameter in parent.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    if adapted:
        apply_prodial(parent, CONFIG)
        randomise_adapters(parent)
    return parent.bfloat16().to(DEVICE, dtype)


def run(dtype: torch.dtype, scan: str, adapted: bool) -> dict[str, Tensor]:
    module = mixer(dtype, scan, adapted)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, TOKENS, VIM_TINY, generator=generator).bfloat16()
    x = x.to(DEVICE, dtype).requires_grad_()
    output = module(x)
    generator.manual_seed(2)
    output.backward(torch.randn(output.shape, generator=generator).bfloat16().to(DEVICE, dtype))
    gradients = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
    return {"output": output.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize("adapted", [False, True])
def test_mixer(adapted: bool) -> None:
    """The accuracy rule in the mean, per tensor."""
    result = run(torch.bfloat16, "auto", adapted)
    eager = run(torch.bfloat16, "torch", adapted)
    exact = run(torch.float64, "torch", adapted)
    assert len(result) == (2 + 8 if adapted else 2 + 2 + 2 * 7)
    assert result.keys() == exact.keys()
    for name, tensor in result.items():
        assert tensor.count_nonzero() > 0, f"{name} is dead"
        error = (tensor.double() - exact[name].double()).norm()
        allowed = 2 * (eager[name].double() - exact[name].double()).norm()
        allowed += torch.finfo(torch.bfloat16).eps / 2 * exact[name].double().norm()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def model(**options: object) -> VisionMamba:
    torch.manual_seed(0)
    return VisionMamba.from_size("tiny", num_classes=102, depth=6, **options)


def images(batch: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 224, 224, generator=generator).to(DEVICE)


def adapt(network: VisionMamba) -> VisionMamba:
    apply_prodial(network, CONFIG)
    randomise_adapters(network)
    return network.to(DEVICE)


@pytest.mark.parametrize("autocast", [False, True])
def test_model_trains_and_merges(autocast: bool) -> None:
    network = adapt(model())
    expected = adapt(model(scan="torch"))(images())
    if not autocast:
        network = network.bfloat16()
    inputs = images() if autocast else images().bfloat16()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        output = network(inputs)
    assert (output.float() - expected).norm() < 0.05 * expected.norm()
    output.float().square().sum().backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype is parameter.dtype
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.count_nonzero() > 0, f"{name} is dead"
    if not autocast:
        merged = merge_prodial(copy.deepcopy(network))(inputs)
        assert (merged - output).norm() < 0.05 * output.norm()


def test_fused_add_norm_equals_pytorch() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        norm = AddRMSNorm(VIM_TINY).to(DEVICE, dtype)
        nn.init.uniform_(norm.weight)
        x = torch.randn(2, TOKENS, VIM_TINY, device=DEVICE, dtype=dtype)
        residual = torch.randn(2, TOKENS, VIM_TINY, device=DEVICE)
        for present in (None, residual):
            normed, total = norm(x, present)
            other = None if present is None else present.cpu()
            expected, expected_total = copy.deepcopy(norm).cpu()(x.cpu(), other)
            assert normed.dtype is dtype
            assert total.dtype is torch.float32
            torch.testing.assert_close(total.cpu(), expected_total)
            torch.testing.assert_close(normed.cpu(), expected, rtol=2e-2, atol=1e-3)


def test_the_fused_scan_needs_less_memory() -> None:
    def peak(scan: str) -> int:
        network = adapt(model(scan=scan)).bfloat16()
        inputs = images(16).bfloat16()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        network(inputs).float().square().sum().backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak("auto") < 0.1 * peak("torch")


def test_cuda_graph_replays_a_training_step() -> None:
    network, inputs = adapt(model()).bfloat16(), images().bfloat16()
    trained = [p for p in network.parameters() if p.requires_grad]

    def step() -> list[Tensor]:
        loss = network(inputs).float().square().mean()
        return [loss, *torch.autograd.grad(loss, trained)]

    replay, results = captured(step)
    inputs.copy_(torch.randn_like(inputs))
    replay()
    for got, expected in zip(results, step(), strict=True):
        # The scan's gradients of A and D are sums by atomics; those of adapters are not, but
        # they are made from what is.
        error = (got - expected).float().norm()
        assert error <= 0.02 * expected.float().norm()
