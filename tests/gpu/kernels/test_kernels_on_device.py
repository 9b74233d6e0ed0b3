"""The Triton kernels on a real GPU, at the sizes of real models. Run with ``-m gpu``."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prodial_kernels import ProdialLinear, prodial_linear
from prodial_kernels.testing import assert_case_accurate, make_case
from support.captured.on_device import captured
from support.kernels.kernel_cases import run

pytestmark = pytest.mark.gpu


SHAPES = [
    # Every tile size that choose_gemm returns on Hopper, both directions, ragged edges included.
    pytest.param(2048, 768, 3072, 1, 16, id="130m-in"),
    pytest.param(2048, 1536, 768, 24, 16, id="130m-out-P24"),
    pytest.param(16384, 768, 3072, 48, 16, id="130m-in-long-P48"),
    pytest.param(8192, 2048, 8192, 1, 16, id="1.4b-in"),
    pytest.param(513, 768, 3352, 6, 33, id="mamba2-130m-in-P6-r33"),
    pytest.param(300, 1024, 4384, 16, 64, id="mamba2-370m-in-r64"),
    pytest.param(129, 192, 768, 12, 4, id="vim-tiny-P12"),
    pytest.param(1000, 200, 300, 8, 100, id="unaligned-r100"),
    pytest.param(777, 250, 333, 2, 8, id="no-copy-engine"),
    pytest.param(1, 96, 80, 6, 5, id="one-token"),
    pytest.param(0, 96, 80, 6, 5, id="no-token"),
    pytest.param(400, 768, 1000, 128, 200, id="P128-r200"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "k", "n", "block_size", "r"), SHAPES)
def test_output_and_gradients_match_fp64(
    m: int, k: int, n: int, block_size: int, r: int, dtype: torch.dtype
) -> None:
    case = make_case(m, k, n, block_size=block_size, r=r, device="cuda")
    assert_case_accurate(case, run, compute=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scale_gradient_is_exact_for_every_scale(dtype: torch.dtype) -> None:
    case = make_case(3000, 768, 640, block_size=12, r=16, device="cuda")
    assert case.scale is not None
    case.scale[::5], case.scale[1::5], case.scale[2::5], case.scale[3::5] = 0.0, -1.0, 1e-3, -1e-6
    assert_case_accurate(case, run, compute=dtype)
    assert_case_accurate(replace(case, bias=None), run, compute=dtype)


@pytest.mark.parametrize("diagonal", ["relu", "free"])
@pytest.mark.parametrize(
    "absent", [("blocks",), ("scale",), ("bias",), ("lora_a", "lora_b"), ("blocks", "scale")]
)
def test_every_part_is_optional(absent: tuple[str, ...], diagonal: str) -> None:
    case = make_case(700, 384, 192, block_size=12, r=16, device="cuda", diagonal=diagonal)
    none: dict[str, Any] = dict.fromkeys(absent)
    assert_case_accurate(replace(case, **none), run, compute=torch.bfloat16)


def test_two_runs_are_bit_equal_and_auto_is_triton() -> None:
    case = make_case(5000, 768, 3072, block_size=12, r=16, device="cuda")
    case = case.cast(torch.bfloat16, torch.float32)
    first, second = case.run(run), case.run(lambda c: run(c, "auto"))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_strided_rows_and_expanded_gradient() -> None:
    case = make_case(600, 768, 384, block_size=12, r=16, device="cuda")
    case = case.cast(torch.bfloat16, torch.float32)
    wide = torch.randn(600, 1536, device="cuda", dtype=torch.bfloat16)
    for start in (0, 8, 3):  # 3: rows that the copy engine cannot address
        strided = replace(
            case, x=wide[:, start : start + 768], grad_output=case.grad_output[:1].expand(600, -1)
        )
        assert_case_accurate(strided, run, compute=torch.bfloat16)


def test_nothing_of_the_size_of_the_weight_is_kept_and_the_peak_is_bounded() -> None:
    m, k, n = 16384, 768, 3072
    case = make_case(1, k, n, block_size=12, r=16, device="cuda")
    case = case.cast(torch.bfloat16, torch.float32)
    case.x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    case.grad_output = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
    case.bias = None
    case.run(run)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    case.x.requires_grad_()
    assert case.scale is not None
    case.scale.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run(case)
    fresh = {
        t.untyped_storage().data_ptr(): t.numel()
        for t in saved
        if t.untyped_storage().data_ptr()
        not in {
            p.untyped_storage().data_ptr()
            for p in (case.x, case.weight, case.blocks, case.scale, case.lora_a, case.lora_b)
            if p is not None
        }
    }
    assert sorted(fresh.values()) == [n, m * 16, m * n]  # s − 1, made of the s given, H and Y
    del output
    saved.clear()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    case.run(run)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    frozen = 2 * (m * n + m * k)
    assert peak <= 1.10 * frozen, f"{peak / frozen:.3f} of the frozen layer's peak"


def layer() -> ProdialLinear:
    linear = nn.Linear(768, 1536, device="cuda", dtype=torch.bfloat16)
    module = ProdialLinear.from_linear(linear, r=16, block_size=12)
    for _, parameter in module.adapter_parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return module


def gradients(module: ProdialLinear, output: Tensor) -> list[Tensor]:
    parameters = [parameter for _, parameter in module.adapter_parameters()]
    return list(torch.autograd.grad(output.float().square().mean(), parameters))


def test_compile_with_dynamic_tokens_is_one_graph() -> None:
    module = layer()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    counter = torch._dynamo.utils.counters
    counter.clear()
    for tokens in (64, 300, 1024):
        x = torch.randn(tokens, 768, device="cuda", dtype=torch.bfloat16)
        for got, expected in zip(
            gradients(module, compiled(x)), gradients(module, module(x)), strict=True
        ):
            torch.testing.assert_close(got, expected)
    assert counter["stats"]["unique_graphs"] == 1


def test_operators_pass_opcheck() -> None:
    from prodial_kernels.ops import operators

    assert operators
    case = make_case(40, 96, 64, block_size=12, r=16, device="cuda")
    case = case.cast(torch.bfloat16, torch.float32)
    operands = (
        case.x, case.weight, case.blocks, case.scale_deviation, case.lora_a, case.lora_b, case.bias,
        None,
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.prodial_kernels.linear_forward.default, (*operands, 0.5, 0.0, True, 0)
    )
    y, h = torch.ops.prodial_kernels.linear_forward(*operands, 0.5, 0.0, True, 0)
    torch.library.opcheck(
        torch.ops.prodial_kernels.linear_backward.default,
        (case.grad_output, *operands, y, h, None, 0.5, 0.0, True, *[True] * 6),
    )


def test_cuda_graph_replays_forward_and_backward() -> None:
    module = layer()
    x = torch.randn(512, 768, device="cuda", dtype=torch.bfloat16)
    replay, results = captured(lambda: gradients(module, module(x)))
    x.copy_(torch.randn_like(x))
    replay()
    for got, expected in zip(results, gradients(module, module(x)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_dropout(use_reentrant: bool) -> None:
    linear = nn.Linear(768, 1536, device="cuda", dtype=torch.bfloat16)
    module = ProdialLinear.from_linear(linear, r=16, lora_dropout=0.3)
    with torch.no_grad():
        assert module.prodial_b is not None
        module.prodial_b.normal_()
    x = torch.randn(512, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    results = []
    for wrap in (False, True):
        torch.manual_seed(5)
        output = checkpoint(module, x, use_reentrant=use_reentrant) if wrap else module(x)
        module.zero_grad()
        output.float().square().mean().backward()
        results.append([output] + [p.grad.clone() for _, p in module.adapter_parameters()])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_autocast_and_two_streams() -> None:
    module = layer().float()
    x = torch.randn(512, 768, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        output = module(x)
    assert output.dtype is torch.bfloat16
    expected = gradients(module, output)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.autocast("cuda", torch.bfloat16):
        twin = copy.deepcopy(module)
        on_stream = gradients(twin, twin(x))
    stream.synchronize()
    for got, wanted in zip(on_stream, expected, strict=True):
        assert got.dtype is torch.float32
        assert torch.equal(got, wanted)


def test_mismatched_device_and_dtype_are_named() -> None:
    module = layer()
    with pytest.raises(ValueError, match="must be on the device of x"):
        module(torch.randn(4, 768, dtype=torch.bfloat16))
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(4, 768, device="cuda", dtype=dtype)
        with pytest.raises(TypeError, match=str(dtype)):
            prodial_linear(
                x, x.new_ones(8, 768), blocks=None, scale=x.new_ones(8), lora_a=None, lora_b=None,
                impl="triton",
            )  # fmt: skip
