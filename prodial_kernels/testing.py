"""The accuracy rule and the input factories that tests, benchmarks and users share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prodial_kernels.kernels.projector.operands import (
    Compute,
    Impl,
    Operands,
    ProjectionOptions,
)
from prodial_kernels.ops.reference import reference_linear, scale_deviation_of


def error_budget(eager: Tensor, exact: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Return the largest allowed (maximum, root-mean-square) error against ``exact``.

    The rule: ``|result − fp64| <= 2 |same-dtype eager − fp64| + rounding band``. The band is one
    rounding of the exact value to ``dtype``, the dtype the matrix products run in.

    Args:
        eager: The plain PyTorch result in the same dtypes as the result under test.
        exact: The fp64 result, same shape.
        dtype: Compute dtype.
    """
    unit_roundoff = torch.finfo(dtype).eps / 2
    error = (eager.double() - exact).abs()
    return (
        2 * _maximum(error) + unit_roundoff * _maximum(exact.abs()),
        2 * _rms(error) + unit_roundoff * _rms(exact),
    )


def assert_accurate(
    name: str, result: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype
) -> None:
    """Raise AssertionError unless ``result`` keeps :func:`error_budget`, in both norms."""
    if result.shape != exact.shape:
        raise AssertionError(f"{name}: shape {list(result.shape)}, expected {list(exact.shape)}")
    error = (result.double() - exact.double()).abs()
    largest, typical = error_budget(eager, exact.double(), dtype)
    # "not <=" rather than ">": a NaN must fail.
    if not _maximum(error) <= largest or not _rms(error) <= typical:
        raise AssertionError(
            f"{name}: error max {_maximum(error):.3e} rms {_rms(error):.3e}, "
            f"allowed max {largest:.3e} rms {typical:.3e}"
        )


@dataclass
class LinearCase:
    """Operands of one projector with every adapter part present.

    Shapes as in :func:`prodial_kernels.prodial_linear`; set parts to None for ablations.
    """

    x: Tensor
    weight: Tensor
    blocks: Tensor | None
    scale: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    bias: Tensor | None
    grad_output: Tensor
    dropout_mask: Tensor | None = None
    lora_scaling: float = 0.5
    lora_dropout: float = 0.0
    diagonal: str = "relu"
    compute: Compute = "same"

    TRAINED = ("x", "blocks", "scale", "lora_a", "lora_b", "bias")

    def cast(self, compute: torch.dtype, master: torch.dtype) -> LinearCase:
        """Return a detached copy: activations and weight in ``compute``, adapter in ``master``."""
        kinds = {
            "x": compute, "weight": compute, "bias": compute, "grad_output": compute,
            "blocks": master, "scale": master, "lora_a": master, "lora_b": master,
        }  # fmt: skip
        cast: dict[str, Tensor | None] = {}
        for name, dtype in kinds.items():
            tensor = getattr(self, name)
            cast[name] = None if tensor is None else tensor.detach().to(dtype)
        return replace(self, **cast)  # type: ignore[arg-type]

    def run(self, function: Callable[[LinearCase], Tensor]) -> dict[str, Tensor]:
        """Run ``function(case)`` forward and backward; return ``output`` and every gradient."""
        leaves: dict[str, Tensor] = {}
        for name in self.TRAINED:
            tensor = getattr(self, name)
            if tensor is not None:
                # A view of the original keeps non-contiguous strides under test.
                leaves[name] = tensor.detach().requires_grad_()
        case = replace(self, **leaves)  # type: ignore[arg-type]
        output = function(case)
        gradients = torch.autograd.grad(output, list(leaves.values()), self.grad_output)
        named = dict(zip((f"d_{name}" for name in leaves), gradients, strict=True))
        return {"output": output.detach(), **named}

    def reference(self) -> Tensor:
        """The definition on these operands."""
        return reference_linear(self.x, self.operands, self.options("reference"))

    @property
    def operands(self) -> Operands:
        """The tensors beside ``x``, as the package's functions take them."""
        return Operands(
            self.weight, self.blocks, self.scale_deviation, self.lora_a, self.lora_b, self.bias,
            self.dropout_mask,
        )  # fmt: skip

    def options(self, impl: Impl) -> ProjectionOptions:
        """What is not a tensor, for an implementation."""
        return ProjectionOptions(
            impl, self.lora_scaling, self.lora_dropout, self.diagonal, compute=self.compute
        )

    @property
    def scale_deviation(self) -> Tensor | None:
        """What the operation takes in the place of s: s − 1, [N]."""
        return None if self.scale is None else scale_deviation_of(self.scale)


def make_case(
    tokens: int | tuple[int, ...],
    in_features: int,
    out_features: int,
    *,
    block_size: int = 1,
    r: int = 4,
    diagonal: str = "relu",
    device: str = "cpu",
    seed: int = 0,
) -> LinearCase:
    """Draw random operands in fp64 at the scales that occur in training.

    Args:
        tokens: Leading shape of x.
        in_features: K, a multiple of ``block_size``.
        out_features: N.
        block_size: P.
        r: Rank of the LoRA part.
        diagonal: ``"relu"`` or ``"free"``.
        device: Where the tensors live.
        seed: Seed of the draw, which is made on the CPU.
    """
    lead = (tokens,) if isinstance(tokens, int) else tokens
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64) * std
        return drawn.to(device)

    return LinearCase(
        x=normal(*lead, in_features),
        weight=normal(out_features, in_features, std=in_features**-0.5),
        blocks=normal(in_features // block_size, block_size, block_size, std=0.3),
        scale=1 + normal(out_features, std=0.3),
        lora_a=normal(r, in_features, std=in_features**-0.5),
        lora_b=normal(out_features, r, std=max(r, 1) ** -0.5),
        bias=normal(out_features),
        grad_output=normal(*lead, out_features),
        diagonal=diagonal,
    )


def assert_case_accurate(
    case: LinearCase,
    function: Callable[[LinearCase], Tensor],
    *,
    compute: torch.dtype,
    master: torch.dtype = torch.float32,
) -> None:
    """Check output and every gradient of ``function`` by the accuracy rule on ``case``.

    The operands are rounded to the dtypes under test first, so that fp64 sees the same inputs.
    """
    rounded = case.cast(compute, master)
    exact = rounded.cast(torch.float64, torch.float64).run(LinearCase.reference)
    eager = rounded.run(LinearCase.reference)
    assert_all_accurate(rounded.run(function), eager, exact, compute)


def assert_all_accurate(
    result: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Apply :func:`assert_accurate` to every named tensor."""
    if result.keys() != exact.keys():
        raise AssertionError(f"got {sorted(result)}, expected {sorted(exact)}")
    for name, tensor in result.items():
        assert_accurate(name, tensor, eager[name], exact[name], dtype)


def _maximum(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _rms(values: Tensor) -> float:
    if not values.numel():
        return 0.0
    return math.sqrt(float(values.double().square().mean()))
