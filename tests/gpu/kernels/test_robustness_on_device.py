"""What only a device shows: real sizes, streams, threads, several GPUs, graphs with dropout.

Edges that the interpreter can run too are in ``tests/kernels/projector/test_robustness.py``.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from prodial_kernels import ProdialLinear, prodial_linear
from prodial_kernels.testing import LinearCase, assert_case_accurate, make_case
from support.captured.on_device import captured

pytestmark = pytest.mark.gpu


def run(case: LinearCase, **changes: Any) -> Tensor:
    options = {
        "blocks": case.blocks, "scale": case.scale, "lora_a": case.lora_a, "lora_b": case.lora_b,
        "bias": case.bias, "lora_scaling": case.lora_scaling, "diagonal": case.diagonal,
        "impl": "triton", **changes,
    }  # fmt: skip
    return prodial_linear(case.x, case.weight, **options)


SIZES = [
    # M, K, N, P, r: Mamba-2's in_proj widths, every first-class block size, ranks beside 2^n.
    (2, 768, 3352, 48, 1),
    (63, 1152, 4384, 12, 2),
    (129, 2048, 10576, 16, 8),
    (129, 3352, 768, 1, 17),
    (63, 4384, 96, 1, 65),
    (2, 10576, 40, 16, 128),
    (1000, 384, 1672, 6, 256),
    (515, 768, 770, 96, 15),
    (129, 1152, 67, 128, 64),
    (777, 1001, 999, 7, 33),
    (4097, 1540, 516, 4, 16),
    (16385, 192, 384, 24, 16),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_of_real_models_and_none(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    m, k, n, block_size, r = sizes
    case = make_case(m, k, n, block_size=block_size, r=r, device="cuda")
    assert_case_accurate(case, run, compute=dtype)


@pytest.mark.parametrize("block_size", [192, 256, 768], ids=lambda size: f"P=K={size}")
def test_one_dense_block(block_size: int) -> None:
    case = make_case(300, block_size, 384, block_size=block_size, r=16, device="cuda")
    assert_case_accurate(case, run, compute=torch.bfloat16)


def test_offsets_beyond_two_to_the_31st_element() -> None:
    """Rows so far apart that row * stride leaves 32 bits."""
    m, k, n, stride = 4200, 96, 80, 520_000
    case = make_case(m, k, n, block_size=6, r=16, device="cuda").cast(torch.bfloat16, torch.float32)
    storage = torch.empty(m, stride, device="cuda", dtype=torch.bfloat16)
    far, near = storage[:, :k], case.x
    far.copy_(near)
    expected = case.run(run)
    case.x = far
    for name, tensor in case.run(run).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture
def case() -> LinearCase:
    drawn = make_case(1500, 768, 1536, block_size=12, r=16, device="cuda")
    return drawn.cast(torch.bfloat16, torch.float32)


def assert_equal_runs(results: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    torch.cuda.synchronize()
    for result in results:
        for name, tensor in result.items():
            assert torch.equal(tensor, expected[name]), name


def test_two_streams_at_once(case: LinearCase) -> None:
    expected = case.run(run)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    results = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(case.run(run))
    assert_equal_runs(results, expected)


def test_temporaries_are_not_reused_too_early(case: LinearCase) -> None:
    """Temporaries are freed while their kernels still run; nothing may take them too early."""
    expected = case.run(run)
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        results.append(case.run(run))
        # Fresh allocations on the same stream land on what was just freed.
        for size in (1536 * 768, 1500 * 16, 1500 * 1536):
            torch.full((size,), float("nan"), device="cuda", dtype=torch.bfloat16)
    assert_equal_runs(results, expected)


@pytest.mark.parametrize("own_stream", [False, True])
def test_two_threads_at_once(case: LinearCase, own_stream: bool) -> None:
    expected = case.run(run)
    torch.cuda.synchronize()
    barrier = threading.Barrier(2)

    def work(_: int) -> list[dict[str, Tensor]]:
        stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
        barrier.wait()
        with torch.cuda.stream(stream):
            return [case.run(run) for _ in range(20)]

    with ThreadPoolExecutor(2) as executor:
        for results in executor.map(work, range(2)):
            assert_equal_runs(results, expected)


def test_two_threads_compile_at_once() -> None:
    """Sizes and constants that no other test uses, so that both threads find nothing compiled."""
    drawn = make_case(85, 176, 208, block_size=22, r=9, device="cuda", diagonal="free")
    drawn = drawn.cast(torch.float16, torch.float32)
    barrier = threading.Barrier(2)

    def work(_: int) -> dict[str, Tensor]:
        barrier.wait()
        return drawn.run(run)

    with ThreadPoolExecutor(2) as executor:
        first, second = executor.map(work, range(2))
    assert_equal_runs([first], second)


def test_another_device_than_the_current_one(case: LinearCase) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected = {name: tensor.cpu() for name, tensor in case.run(run).items()}
    other = LinearCase(
        **{
            name: value.to("cuda:1") if isinstance(value, Tensor) else value
            for name, value in vars(case).items()
        }
    )
    assert torch.cuda.current_device() == 0
    for name, tensor in other.run(run).items():
        assert tensor.device == torch.device("cuda", 1), name
        assert torch.equal(tensor.cpu(), expected[name]), name


def layer(lora_dropout: float = 0.0) -> ProdialLinear:
    linear = nn.Linear(384, 768, device="cuda", dtype=torch.bfloat16)
    module = ProdialLinear.from_linear(linear, r=16, block_size=12, lora_dropout=lora_dropout)
    for _, parameter in module.adapter_parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return module


def gradients(module: ProdialLinear, x: Tensor) -> list[Tensor]:
    output = module(x)
    parameters = [parameter for _, parameter in module.adapter_parameters()]
    found = torch.autograd.grad(output.float().square().mean(), [x, *parameters])
    return [output.detach(), *found]


def test_cuda_graph_draws_a_new_mask_at_each_replay() -> None:
    module = layer(lora_dropout=0.5)
    x = torch.randn(512, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    launch, results = captured(lambda: gradients(module, x))

    def replay() -> list[Tensor]:
        launch()
        return [tensor.clone() for tensor in results]

    torch.manual_seed(8)
    first, second = replay(), replay()
    torch.manual_seed(8)
    again, second_again = replay(), replay()
    for one, two, same, same_two in zip(first, second, again, second_again, strict=True):
        assert not torch.equal(one, two)
        assert torch.equal(one, same)
        assert torch.equal(two, same_two)
    # Outside of the graph the same generator state draws the same mask.
    torch.manual_seed(8)
    for replayed, eager in zip(first, gradients(module, x), strict=True):
        assert torch.equal(replayed, eager)


def test_graphed_callable_trains() -> None:
    module, twin = layer(), layer()
    twin.load_state_dict(module.state_dict())
    sample = torch.randn(256, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(twin, (sample,))
    for _ in range(3):
        x = torch.randn(256, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        results = []
        for function, owner in ((module, module), (graphed, twin)):
            owner.zero_grad()
            function(x).float().square().mean().backward()
            results.append([parameter.grad for _, parameter in owner.adapter_parameters()])
        for eager, replayed in zip(*results, strict=True):
            assert torch.equal(eager, replayed)


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE])
def test_selective_checkpointing_of_a_deep_stack(policy: CheckpointPolicy) -> None:
    up, down = layer(lora_dropout=0.3), nn.Linear(768, 384, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(512, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    operator = torch.ops.prodial_kernels.linear_forward.default

    def choose(_: Any, function: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        return policy if function is operator else CheckpointPolicy.PREFER_RECOMPUTE

    def block(hidden: Tensor) -> Tensor:
        return hidden + down(torch.nn.functional.silu(up(hidden)))

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(choose)

    results = []
    for wrapped in (False, True):
        torch.manual_seed(2)
        hidden = x
        for _ in range(4):
            hidden = (
                checkpoint(block, hidden, use_reentrant=False, context_fn=contexts)
                if wrapped
                else block(hidden)
            )
        parameters = [x, *(parameter for _, parameter in up.adapter_parameters())]
        results.append(torch.autograd.grad(hidden.float().square().mean(), parameters))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_compile_with_inductor_under_autocast_and_dropout() -> None:
    module = layer(lora_dropout=0.3).float()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return torch.nn.functional.silu(module(x))

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    parameters = [parameter for _, parameter in module.adapter_parameters()]
    for tokens in (64, 300, 1024):
        x = torch.randn(2, tokens, 384, device="cuda")
        output = compiled(x)
        assert output.dtype is torch.bfloat16
        for gradient in torch.autograd.grad(output.float().square().mean(), parameters):
            assert gradient.dtype is torch.float32
            assert gradient.isfinite().all()
    assert counters["stats"]["unique_graphs"] == 1
