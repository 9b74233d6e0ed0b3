"""What a user can write in plain PyTorch: eager, and through torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.projector.rivals.layer import Layer, leaves
from benchmarks.projector.rivals.methods import ADAPTER
from prodial_kernels.linear import ProdialLinear
from prodial_kernels.ops.diagonal import deviation, rotate
from prodial_kernels.ops.reference import scale_deviation_of
from prodial_kernels.quantization.fp8 import FP8Linear
from prodial_kernels.testing import LinearCase

P = ParamSpec("P")
R = TypeVar("R")
# Of (x, w, blocks, scale, a, b, alpha).
Formula = Callable[..., Tensor]


def ours(case: LinearCase) -> Layer:
    """The package's layer: its Triton kernels on a GPU, its portable form elsewhere.

    By its public names alone, so that other versions of the package can be compared with this one.
    """
    n, k = case.weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(case.weight, requires_grad=False)
    return _adapted_layer(case, linear)


def ours_in_fp8(case: LinearCase) -> Layer:
    """The package's layer on a weight that is stored in fp8, and multiplied in it."""
    return _adapted_layer(case, FP8Linear.quantize(case.weight, None), compute="fp8")


def _adapted_layer(case: LinearCase, base: nn.Linear | FP8Linear, **options: Any) -> Layer:
    trained = leaves(case, *ADAPTER)
    blocks, scale, a, b = (leaf.detach() for leaf in trained.values())
    layer = ProdialLinear.from_linear(
        base, r=a.shape[0], block_size=blocks.shape[1], lora_alpha=case.lora_scaling * a.shape[0],
        diagonal=case.diagonal, impl="triton" if case.x.is_cuda else "torch", **options,
    )  # fmt: skip
    # A layer keeps the scale's deviation from 1; the gradient is the scale's.
    values = {"blocks": blocks, "scale": scale_deviation_of(scale), "a": a, "b": b}
    for name, parameter in layer.adapter_parameters():
        parameter.data = values[name.removeprefix("prodial_")]
    named = dict(layer.adapter_parameters())
    return Layer(
        layer, {leaf: named[f"prodial_{name}"] for leaf, name in zip(trained, values, strict=True)}
    )


def formula(
    x: Tensor, w: Tensor, blocks: Tensor, scale: Tensor, a: Tensor, b: Tensor, alpha: float
) -> Tensor:
    """The definition, activation by activation."""
    y = (rotate(x, deviation(blocks, "relu")) @ w.T * scale).to(x.dtype)
    return y + alpha * ((x @ a.T.to(x.dtype)) @ b.T.to(x.dtype))


def materialised(
    x: Tensor, w: Tensor, blocks: Tensor, scale: Tensor, a: Tensor, b: Tensor, alpha: float
) -> Tensor:
    """W' formed in the compute dtype, then one linear layer."""
    e = deviation(blocks, "relu").to(w.dtype)
    adapted = scale.to(w.dtype)[:, None] * rotate(w, e, transpose=True)
    return F.linear(x, adapted + alpha * (b.to(w.dtype) @ a.to(w.dtype)))


def authors(
    x: Tensor, w: Tensor, blocks: Tensor, scale: Tensor, a: Tensor, b: Tensor, alpha: float
) -> Tensor:
    """The released code's shape: diag(s) and D_b as dense matrices, made in every forward."""
    d_a = torch.block_diag(*blocks.to(w.dtype))
    eye = torch.eye(d_a.shape[0], device=w.device, dtype=w.dtype)
    # Its relu has the derivative 0 at 0; no element of these cases is exactly 0.
    d_b = d_a * (1 - eye) + eye - torch.relu(d_a * eye)
    adapted = torch.diag(scale.to(w.dtype)) @ w @ d_b
    return x @ adapted.T + alpha * ((x @ a.T.to(x.dtype)) @ b.T.to(x.dtype))


def lora_formula(x: Tensor, w: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """LoRA without PEFT."""
    return F.linear(x, w) + alpha * ((x @ a.T.to(x.dtype)) @ b.T.to(x.dtype))


def adapted(function: Formula, *, compiled: bool = False) -> Callable[[LinearCase], Layer]:
    """Make a rival that trains the whole adapter through ``function``."""

    def prepare(case: LinearCase) -> Layer:
        trained = leaves(case, *ADAPTER)
        call = compile_for(case.x.device)(function) if compiled else function
        return Layer(lambda x: call(x, case.weight, *trained.values(), case.lora_scaling), trained)

    return prepare


def frozen(case: LinearCase) -> Layer:
    """The floor: the frozen layer's forward and dX, on cuBLAS."""
    return Layer(lambda x: F.linear(x, case.weight), {})


def lora(case: LinearCase, *, compiled: bool = False) -> Layer:
    """LoRA in three products."""
    trained = leaves(case, "lora_a", "lora_b")
    call: Formula = lora_formula
    if compiled:
        call = compile_for(case.x.device)(call)
    return Layer(lambda x: call(x, case.weight, *trained.values(), case.lora_scaling), trained)


def lora_compiled(case: LinearCase) -> Layer:
    """The same through torch.compile."""
    return lora(case, compiled=True)


def compile_for(device: torch.device) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """torch.compile for one fixed shape; on a CPU without generating code, which takes minutes."""
    # Loading the compiler takes seconds, which whoever does not compile need not spend.
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    # One compiled version for each shape; past the limit it would run uncompiled.
    dynamo.recompile_limit = 1024
    dynamo.accumulated_recompile_limit = 4096
    dynamo.fail_on_recompile_limit_hit = True
    # Each process tunes for itself: choices on disk may stem from another device.
    inductor.autotune_local_cache = False
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    return torch.compile(fullgraph=True, dynamic=False, backend=backend)
