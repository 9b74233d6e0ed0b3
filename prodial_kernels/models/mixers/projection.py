"""A mixer's projection, adapted or not, as :mod:`prodial_kernels.ops.projection` takes it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prodial_kernels.functional import checked_linear, prepared
from prodial_kernels.kernels.projector.operands import Operands, ProjectionOptions
from prodial_kernels.linear import BESIDE, ProdialLinear, weight_like
from prodial_kernels.models.patch_point import View
from prodial_kernels.ops.autocast import autocast_dtype
from prodial_kernels.quantization import QuantizedLinear


def operands_of(
    layer: nn.Linear | QuantizedLinear | ProdialLinear, x: Tensor
) -> tuple[Operands, ProjectionOptions]:
    """Return what a call of ``layer`` on ``x`` would compute with, and draw its dropout.

    Args:
        layer: A projection, dense or quantised. One without an active adapter gives its weight,
            which may be trained if it is dense.
        x: [b, l, in_features]; only shape, dtype, device are looked at, so that a call can be
            prepared before its input exists (see :func:`placeholder`).

    Raises:
        RuntimeError: A merged layer in training mode, when no adapter gradient could flow.
        TypeError: A dtype that cannot be used.
        ValueError: A shape or device that does not fit, or a layer that :func:`is_explicit`
            answers False for.
    """
    if isinstance(layer, QuantizedLinear):
        return prepared(x, *layer.projection())
    if not isinstance(layer, ProdialLinear):
        return _dense_operands(x, layer.weight, layer.bias)
    base = layer.base_layer
    if not layer.adapter_enabled:
        return operands_of(base, x)
    if layer.merged:
        if layer.training and torch.is_grad_enabled():
            raise RuntimeError(
                "this ProdialLinear is merged, so its adapter would get no gradient; call "
                "unmerge() before training, or eval() for inference"
            )
        return _dense_operands(x, layer.effective_weight(), layer.bias)
    if not is_explicit(layer):
        raise ValueError("a projector with impl='reference' has no explicit backward; call it")
    return prepared(x, *layer.projection(), training=layer.training)


def _dense_operands(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Operands, ProjectionOptions]:
    dtype = autocast_dtype(x) or x.dtype
    operands = Operands(weight.to(dtype), bias=None if bias is None else bias.to(dtype))
    return operands, ProjectionOptions("plain")


def placeholder(x: Tensor, features: int) -> Tensor:
    """Return a stand-in of one element for a tensor like ``x`` [b, l, …] with other features."""
    return x.new_empty(1).expand(*x.shape[:-1], features)


def is_explicit(layer: nn.Module) -> bool:
    """Whether :func:`operands_of` can prepare a call of ``layer``: unless it is the reference."""
    return not isinstance(layer, ProdialLinear) or layer.impl != "reference"


def adapted_children(mixer: nn.Module) -> dict[str, ProdialLinear]:
    """Return the adapted projections of a mixer, by their names in it."""
    return {
        name: child for name, child in mixer.named_children() if isinstance(child, ProdialLinear)
    }


def is_changed(mixer: nn.Module) -> bool:
    """Whether something in a mixer trains: an adapted projection, or what methods put beside it."""
    return any(
        isinstance(module, ProdialLinear) or any(n.startswith(BESIDE) for n in module._parameters)
        for module in (mixer, *mixer.children())
    )


def project_without_bias(layer: ProdialLinear, x: Tensor) -> Tensor:
    """``x W'ᵀ``, [..., in_features] -> [..., out_features]."""
    base = layer.base_layer
    if not layer.adapter_enabled and isinstance(base, QuantizedLinear):
        return checked_linear(x, *base.projection(bias=False))
    if not layer.adapter_enabled or layer.merged:
        return F.linear(x, layer.effective_weight())
    return checked_linear(x, *layer.projection(bias=False), training=layer.training)


class ProjectorOfView:
    """A proxy of a projector for upstream's code: multiplying by its ``weight`` calls it.

    ``weight`` supports what mamba_ssm does with one: ``weight @ columns``, ``F.linear(x, weight)``
    and reading its device, dtype and shape. Other attributes are the projector's own.
    """

    def __init__(self, layer: ProdialLinear) -> None:
        """Stand for ``layer``."""
        self.layer = layer
        self.weight = _CalledWeight(layer)

    def __call__(self, x: Tensor) -> Tensor:
        """``layer(x)``."""
        return self.layer(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


class NoProjection:
    """A projector without a weight, which upstream's fused functions leave to the caller."""

    weight = None
    bias = None


def calling_projectors(mixer: nn.Module, **given: Any) -> View:
    """Return a proxy of ``mixer`` whose adapted projectors are called where it reads weights."""
    projectors = {name: ProjectorOfView(layer) for name, layer in adapted_children(mixer).items()}
    return View(mixer, **projectors, **given)


class _CalledWeight:
    def __init__(self, layer: ProdialLinear) -> None:
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        if name not in ("device", "dtype", "shape"):
            raise AttributeError(
                f"a mixer asked the weight of an adapted projector for {name!r}, which would need "
                "the adapted weight to be formed; this version of the mixer is not supported"
            )
        if name == "shape":
            return torch.Size((self.layer.out_features, self.layer.in_features))
        return getattr(weight_like(self.layer.base_layer), name)

    def __matmul__(self, columns: Tensor) -> Tensor:
        """``W' X`` for X [K, M], contiguous [N, M]."""
        return project_without_bias(self.layer, columns.t()).t().contiguous()

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is F.linear and not kwargs:
            x, weight, *bias = args
            y = project_without_bias(weight.layer, x)
            return y if not bias or bias[0] is None else y + bias[0]
        return NotImplemented
