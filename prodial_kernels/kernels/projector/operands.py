"""What one projection computes with and what it returns, for PyTorch and for the kernels alike.

Named tuples: they are made in every call, where a dataclass costs more host time. Imports no
Triton.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Impl = Literal["auto", "plain", "reference", "torch", "triton"]
"""What computes a projection: autograd on the definition (``"reference"``), the hand-written
backward in PyTorch (``"torch"``) or the kernels (``"triton"``). ``"auto"`` is asked for, and
resolved before anything is computed. ``"plain"`` is a linear layer without an adapter; users do not
name it."""


Compute = Literal["same", "fp8"]
"""What W is multiplied in: the dtype of the input (``"same"``), or fp8 with sums in fp32."""


class Packed(Protocol):
    """A frozen weight in a storage format; see :class:`prodial_kernels.ops.packed.PackedWeight`."""

    def stored(self) -> tuple[Tensor, ...]:
        """Return the tensors that W is stored in."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return a new W [N, K]."""


class Operands(NamedTuple):
    """A projector's tensors: ``Y = s ⊙ ((X D_bᵀ) Wᵀ) + α dropout(X) Aᵀ Bᵀ + bias``.

    Attributes:
        weight: W, [N, K], frozen. Of a packed weight, shape and dtype only (meta device); see
            ``ProjectionOptions.packed``.
        blocks: D_a, [K / P, P, P], or None for no diagonal factor.
        scale_deviation: s − 1, [N], or None for s = 1.
        lora_a: A, [R, K], or None.
        lora_b: B, [N, R], or None.
        bias: [N], or None.
        noise: What dropout is drawn from: a mask like X, bool, True where X is kept
            (``"reference"``, ``"torch"``), a seed [1] int64 (``"triton"``), None for no dropout.
    """

    weight: Tensor
    blocks: Tensor | None = None
    scale_deviation: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    bias: Tensor | None = None
    noise: Tensor | None = None


class ProjectionOptions(NamedTuple):
    """What of a projector is not a tensor; hashable.

    Attributes:
        impl: What computes it. With ``"plain"`` the weight may ask for a gradient.
        lora_scaling: α.
        lora_dropout: Probability behind ``Operands.noise``; without noise there is no dropout.
        diagonal: ``"relu"`` (Eq. 7) or ``"free"`` (D_b = I + D_a).
        packed: Where the weight's values are if ``Operands.weight`` is on the meta device.
        compute: ``"fp8"`` of a weight that is stored in fp8 by 128×128 tiles: X D_bᵀ and dY ⊙ s are
            rounded to fp8 before they are multiplied by it.
    """

    impl: Impl
    lora_scaling: float = 0.0
    lora_dropout: float = 0.0
    diagonal: str = "relu"
    packed: Packed | None = None
    compute: Compute = "same"


class Needs(NamedTuple):
    """Which gradients are asked for, in the order of ``Operands``, the input's first."""

    x: bool
    weight: bool
    blocks: bool
    scale: bool
    lora_a: bool
    lora_b: bool
    bias: bool

    @property
    def input(self) -> bool:
        """Whether anything but the gradients towards x and the bias is asked for, which needs x."""
        return any(self[1:-1])


class Gradients(NamedTuple):
    """Towards x and each of ``Operands`` (``scale``: towards s); None where not asked for."""

    x: Tensor | None = None
    weight: Tensor | None = None
    blocks: Tensor | None = None
    scale: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    bias: Tensor | None = None


class Kept(NamedTuple):
    """What backward may find made already; what is None and needed is made again.

    Attributes:
        y: Y, for the gradient towards s.
        h: H = dropout(X) Aᵀ as forward returned it, for the gradients towards s and B.
        scaled: s ⊙ W, [N, K], for the gradients towards X and D_a.
    """

    y: Tensor | None = None
    h: Tensor | None = None
    scaled: Tensor | None = None
