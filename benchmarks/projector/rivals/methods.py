"""What each method computes, as plain formulas. In fp64 they are what rivals are checked against.

Run in the compute dtype they give the error that the same-dtype formula makes anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.projector.rivals.layer import Layer, leaves
from prodial_kernels.quantization.fp8 import FP8Linear
from prodial_kernels.testing import LinearCase

# PEFT's default block size; OFT has no use for blocks of 1.
OFT_BLOCK = 32
ADAPTER = ("blocks", "scale", "lora_a", "lora_b")


def prodial(case: LinearCase) -> Layer:
    """``s ⊙ ((X D_bᵀ) Wᵀ) + α X Aᵀ Bᵀ``."""
    return _reference(case, *ADAPTER)


def prodial_in_fp8(case: LinearCase) -> Layer:
    """The same with W as fp8 stores it, and X D_bᵀ and dY ⊙ s rounded to fp8."""
    stored = FP8Linear.quantize(case.weight.float(), None)
    weight = stored.dequantize().to(case.weight.dtype)
    return _reference(replace(case, weight=weight, compute="fp8"), *ADAPTER)


def lora(case: LinearCase) -> Layer:
    """``X Wᵀ + α X Aᵀ Bᵀ``."""
    return _reference(replace(case, blocks=None, scale=None), "lora_a", "lora_b")


def frozen(case: LinearCase) -> Layer:
    """``X Wᵀ``: the floor. Only the gradient towards X."""
    return _reference(replace(case, blocks=None, scale=None, lora_a=None, lora_b=None))


def dora(case: LinearCase) -> Layer:
    """``m / |W + α B A| ⊙ (X Wᵀ + α X Aᵀ Bᵀ)``, the norm by rows and without a gradient."""
    trained = leaves(case, "lora_a", "lora_b")
    trained["magnitude"] = dora_magnitude(case).requires_grad_()

    def forward(x: Tensor) -> Tensor:
        a, b = trained["lora_a"].to(x.dtype), trained["lora_b"].to(x.dtype)
        with torch.no_grad():
            norm = torch.linalg.norm(case.weight + case.lora_scaling * (b @ a), dim=1)
        y = x @ case.weight.T + case.lora_scaling * ((x @ a.T) @ b.T)
        return (y * (trained["magnitude"] / norm)).to(x.dtype)

    return Layer(forward, trained)


def oft(case: LinearCase) -> Layer:
    """``(X R) Wᵀ`` with ``R = I + 2Q + 2Q² + 2Q³ + Q⁴`` in blocks of 32, Q skew: PEFT's OFT."""
    trained = {"skew": oft_skew(case).requires_grad_()}
    block = oft_block(case)
    rows, columns = torch.triu_indices(block, block, 1, device=case.x.device)

    def forward(x: Tensor) -> Tensor:
        upper = trained["skew"].new_zeros(case.x.shape[1] // block, block, block)
        upper = upper.index_put(
            (torch.arange(upper.shape[0], device=x.device)[:, None], rows, columns),
            trained["skew"],
        )
        q = upper - upper.mT
        eye = torch.eye(block, device=x.device, dtype=q.dtype)
        rotation = eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        turned = torch.einsum("mgk,gkc->mgc", x.unflatten(1, (-1, block)), rotation.to(x.dtype))
        return turned.flatten(1) @ case.weight.T

    return Layer(forward, trained)


def dora_magnitude(case: LinearCase) -> Tensor:
    """m: the norm that the adapted rows have at the start, times the case's scale. fp32 values."""
    masters = (case.weight, case.lora_a, case.lora_b, case.scale)
    weight, a, b, scale = (part.double() for part in masters if part is not None)
    magnitude = scale * torch.linalg.norm(weight + case.lora_scaling * (b @ a), dim=1)
    return magnitude.float().to(masters[-1].dtype)  # type: ignore[union-attr]


def oft_skew(case: LinearCase) -> Tensor:
    """The strictly upper triangles of Q, [K / block, block (block − 1) / 2], random."""
    block = oft_block(case)
    generator = torch.Generator(case.x.device).manual_seed(1)
    drawn = torch.randn(
        case.x.shape[1] // block, block * (block - 1) // 2,
        device=case.x.device, generator=generator,
    )  # fmt: skip
    wide = torch.float64 if case.x.dtype == torch.float64 else torch.float32
    return (drawn * 0.02).to(wide)


def oft_block(case: LinearCase) -> int:
    """PEFT's default block size, or half of a K that it does not divide."""
    k = case.x.shape[1]
    return OFT_BLOCK if k % OFT_BLOCK == 0 else k // 2


def _reference(case: LinearCase, *names: str) -> Layer:
    trained = leaves(case, *names)
    with_leaves = replace(case, **trained)  # type: ignore[arg-type]
    return Layer(lambda x: replace(with_leaves, x=x).reference(), trained)


METHODS: Mapping[str, Callable[[LinearCase], Layer]] = {
    "frozen": frozen, "ProDiaL": prodial, "ProDiaL in fp8": prodial_in_fp8, "LoRA": lora,
    "DoRA": dora, "OFT": oft,
}  # fmt: skip
