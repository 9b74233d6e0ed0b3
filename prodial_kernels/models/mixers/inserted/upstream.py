"""Upstream's own forward with learned tokens between ``in_proj`` and the convolution.

Upstream gets the longer input of :mod:`.tokens`, and a mixer whose ``in_proj`` overwrites
what it returns at the places of the tokens. So every path of it reads them, caches included: after
the text is read, a prefix is part of the state from which single tokens go on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from prodial_kernels.functional import checked_linear
from prodial_kernels.linear import ProdialLinear
from prodial_kernels.models.mixers.arguments import (
    cache_among,
    mask_among,
    named_arguments,
    parameters_of,
)
from prodial_kernels.models.mixers.inserted.tokens import (
    Layout,
    PaddedLayout,
    behind_padding,
    in_sequence,
    inserted_tokens,
    layout,
    lengthened_mask,
)
from prodial_kernels.models.mixers.projection import project_without_bias
from prodial_kernels.models.patch_point import View
from prodial_kernels.quantization import QuantizedLinear

Method = Callable[..., Any]


def with_inserted(
    mixer: Any,
    upstream: Method,
    view: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    run: Method | None = None,
) -> Any:
    """Call upstream's forward on ``view``, with the tokens of ``mixer`` if it inserts any.

    Args:
        mixer: The mixer itself.
        upstream: Its forward; the first argument is [b, l, d], and so is what it returns.
        view: What stands for the mixer in it.
        args: Of that forward, without self.
        kwargs: Likewise.
        run: What is called instead of ``upstream``, with its arguments.

    Raises:
        ValueError: A text that goes on after one with tokens in its middle, or is padded on the
            left and has them there; rows of several texts.
    """
    run = upstream if run is None else run
    tokens = inserted_tokens(mixer)
    if tokens is None:
        return run(view, *args, **kwargs)
    given = named_arguments(upstream, args, kwargs)
    cache = cache_among(given)
    if cache is not None and continues(given[cache], mixer):
        if tokens.position == "infix":
            raise ValueError(
                "affix-tuning with position='infix' has tokens in the middle of the text, so that "
                "a text cannot go on token by token; call with use_cache=False, or use 'prefix'"
            )
        return run(view, *args, **kwargs)
    hidden = given.pop(next(iter(parameters_of(upstream))))
    batch, length, *_ = hidden.shape
    longer: Layout | PaddedLayout = layout(length, tokens)
    mask = mask_among(given)
    if mask is not None and given[mask] is not None:
        longer = behind_padding(layout(length, tokens), given[mask], tokens.position)
        given[mask] = lengthened_mask(longer, given[mask])
    for name, value in given.items():
        if name != mask and isinstance(value, Tensor) and length in value.shape:
            raise ValueError(
                f"{name} says where texts begin in a row, and affix-tuning inserts tokens before "
                "one text a row; give each text a row of its own"
            )
    columns = in_sequence(mixer, tokens, 0)
    view = View(view, in_proj=_OverwrittenProjector(mixer.in_proj, longer, columns, batch))
    return longer.shortened(run(view, longer.lengthened(hidden), **given))


def continues(cache: Any, mixer: Any) -> bool:
    """Whether a cache holds what ``mixer`` has read before, so that the input goes on with it."""
    offset = getattr(cache, "seqlen_offset", None)
    if offset is not None:
        return bool(offset > 0)
    return bool(cache.has_previous_state(mixer.layer_idx))


class _OverwrittenProjector:
    """An ``in_proj`` whose output holds tokens at their places, called or multiplied by."""

    bias = None

    def __init__(
        self, layer: nn.Module, longer: Layout | PaddedLayout, columns: Tensor, batch: int
    ) -> None:
        self.layer, self.longer, self.columns, self.batch = layer, longer, columns, batch
        self.weight = _OverwrittenWeight(self)

    def __call__(self, x: Tensor) -> Tensor:
        """[b, total, d] -> [b, total, features]."""
        return self.placed(self.layer(x).mT).mT

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def placed(self, xz: Tensor) -> Tensor:
        """Put the tokens into [b, features, total]."""
        return self.longer.placed(xz, self.columns)


class _OverwrittenWeight:
    """What mamba_ssm multiplies by; the bias, which it would add after that, is added here."""

    def __init__(self, projector: _OverwrittenProjector) -> None:
        self.projector = projector

    def __matmul__(self, columns: Tensor) -> Tensor:
        """X [d, b · total] -> [features, b · total]."""
        projector = self.projector
        layer: Any = projector.layer
        rows = columns.t()
        y = _without_bias(layer, rows)
        if layer.bias is not None:
            y = y + layer.bias.to(y.dtype)
        placed = projector.placed(y.unflatten(0, (projector.batch, -1)).mT)
        return placed.transpose(0, 1).flatten(1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.projector.layer.weight, name)


def _without_bias(layer: Any, x: Tensor) -> Tensor:
    if isinstance(layer, ProdialLinear):
        return project_without_bias(layer, x)
    if isinstance(layer, QuantizedLinear):
        return checked_linear(x, *layer.projection(bias=False))
    return F.linear(x, layer.weight)
