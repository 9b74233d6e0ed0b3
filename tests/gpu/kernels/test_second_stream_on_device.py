"""What runs concurrently: launches on a second stream, and PDL launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from prodial_kernels import prodial_linear
from prodial_kernels.kernels.choices.backward_plan import BackwardPlan, choose_backward
from prodial_kernels.kernels.choices.forward_plan import choose_gemm, tail_columns
from prodial_kernels.kernels.choices.tile_sizes import TALL, WIDE, GemmConfig
from prodial_kernels.kernels.projector import gemm, passes, reduce
from prodial_kernels.kernels.projector.passes import device_limits
from prodial_kernels.kernels.replay import recorded_calls
from prodial_kernels.ops import projection
from prodial_kernels.testing import LinearCase, assert_case_accurate, make_case
from support.captured.on_device import captured
from support.kernels.kernel_cases import run, watch
from support.mamba_ssm_loaded import MARKS, language_model, token_ids

pytestmark = MARKS


def channel_first(case: LinearCase) -> Tensor:
    return prodial_linear(
        case.x, case.weight, blocks=case.blocks, scale=case.scale, lora_a=case.lora_a,
        lora_b=case.lora_b, bias=case.bias, lora_scaling=case.lora_scaling, impl="triton",
        channel_first=True,
    ).mT  # fmt: skip


@pytest.mark.parametrize("layout", ["tokens", "channel-first"])
@pytest.mark.parametrize("block_size", [1, 24])
@pytest.mark.parametrize(
    ("m", "k", "n", "tile"),
    [
        (2048, 768, 3072, TALL), (2048, 768, 3352, TALL), (2048, 1024, 2064, TALL),
        (4096, 1024, 4096, WIDE), (4088, 1008, 3352, WIDE),
    ],
    ids=str,
)  # fmt: skip
def test_sums_co_resident_with_the_product(
    m: int, k: int, n: int, tile: GemmConfig, block_size: int, layout: str
) -> None:
    k = k // block_size * block_size
    plan = choose_backward(
        m, n, k, 16, wants_t=True, output_side=True, through_weight=True, bias=False,
        channel_first=False, limits=device_limits(torch.device("cuda", 0)),
    )  # fmt: skip
    if torch.cuda.get_device_capability()[0] == 9:
        assert plan.co_resident
        assert plan.gemm.block_m == tile.block_m
    function = run if layout == "tokens" else channel_first
    case = replace(
        make_case((4, m // 4), k, n, block_size=block_size, r=16, device="cuda"), bias=None
    )
    assert_case_accurate(case, function, compute=torch.bfloat16)
    assert case.scale is not None
    # Columns whose gradient is computed anew, while the product still runs.
    case.scale[::3] = 0.0
    assert_case_accurate(case, function, compute=torch.bfloat16)
    assert_always_the_same(case, function)


@pytest.mark.parametrize(("k", "n"), [(768, 8512), (264, 10576)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_tail_columns_by_narrow_tiles(k: int, n: int, bias: bool) -> None:
    limits = device_limits(torch.device("cuda", 0))
    if limits == ((9, 0), 132):
        assert tail_columns(2048, n, choose_gemm(2048, n, limits), 132)
    case = make_case(2048, k, n, block_size=1, r=16, device="cuda")
    case = case if bias else replace(case, bias=None)
    assert_case_accurate(case, run, compute=torch.bfloat16)
    assert_always_the_same(case, run)


@pytest.mark.parametrize(
    ("m", "k", "n", "r"),
    [
        (2048, 1536, 768, 16),
        (16384, 1536, 768, 16),
        (8192, 2048, 2048, 70),
        # Reduce behind a deferred join.
        (2048, 768, 3072, 64),
    ],
)
def test_pdl_and_deferred_joins_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, m: int, k: int, n: int, r: int
) -> None:
    case = make_case(m, k, n, block_size=1, r=r, device="cuda", seed=3)
    case = replace(case, bias=None).cast(torch.bfloat16, torch.float32)
    pdl: list[bool] = []
    with monkeypatch.context() as patches:
        recorded_calls.reset()
        for module in (gemm, reduce):
            watch(
                patches, module, "launch",
                lambda *_, **named: pdl.append(named.get("launch_pdl", False)),
            )  # fmt: skip
        case.run(run)
    assert any(pdl) == (torch.cuda.get_device_capability()[0] == 9)
    with monkeypatch.context() as patches:
        recorded_calls.reset()
        choose = passes.choose_backward

        def in_turn(*args: Any, **options: Any) -> BackwardPlan:
            plan = choose(*args, **options)
            return replace(plan, gemm=replace(plan.gemm, pdl=False), deferred=False)

        patches.setattr(passes, "supports_pdl", lambda *_: False)
        patches.setattr(passes, "choose_backward", in_turn)
        expected = case.run(run)
    recorded_calls.reset()
    # Calls are recorded, replayed and captured; between them something else is running.
    noise = torch.empty(2**24, device="cuda")
    for _ in range(30):
        noise.normal_()
        for name, value in case.run(run).items():
            assert torch.equal(value, expected[name]), name
    replay, results = captured(lambda: case.run(run))
    for _ in range(10):
        for value in results.values():
            value.fill_(float("nan"))
        replay()
        for name, value in results.items():
            assert torch.equal(value, expected[name]), name


def assert_always_the_same(case: LinearCase, function: Callable[[LinearCase], Tensor]) -> None:
    cast = case.cast(torch.bfloat16, torch.float32)
    expected = cast.run(function)
    for _ in range(30):
        # What is freed in between is written to by whoever comes next.
        torch.empty(int(torch.randint(2**20, 2**25, ())), device="cuda").fill_(float("nan"))
        for name, tensor in cast.run(function).items():
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_what_is_begun_ahead_changes_nothing(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # More tokens than in_proj has columns: with fewer, dY is scaled where s ⊙ W is not prefetched.
    model, ids = language_model(layer, torch.bfloat16, depth=4), token_ids(length=192)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(ids).logits.float().square().mean(), [*trained.values()])

    monkeypatch.setattr(projection, "LEAST_PREFETCHED", 2**40)
    expected = gradients()
    monkeypatch.setattr(projection, "LEAST_PREFETCHED", 1)
    for _ in range(20):
        for name, found, other in zip(trained, gradients(), expected, strict=True):
            # Upstream's scans add up in any order.
            assert (found - other).norm() < 1e-2 * other.norm(), name


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_what_is_begun_ahead_is_captured(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "LEAST_PREFETCHED", 1)
    model, ids = language_model(layer, torch.bfloat16, depth=4), token_ids()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        for parameter in trained:
            assert parameter.grad is not None
            parameter.grad.zero_()
        model(ids).logits.float().square().mean().backward()

    def gradients() -> list[Tensor]:
        return [p.grad.clone() for p in trained if p.grad is not None]

    replay, _ = captured(step, warm_ups=2)
    for _ in range(3):
        ids.copy_(token_ids().roll(1, 0))
        with torch.no_grad():
            for parameter in trained:
                parameter.mul_(1.01)
        step()
        launched = gradients()
        replay()
        for found, other in zip(gradients(), launched, strict=True):
            assert (found - other).norm() < 1e-2 * other.norm()
