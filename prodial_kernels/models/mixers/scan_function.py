"""The scan of one direction, xz [b, 2E, l] -> y [b, E, l], as one function of autograd.

Eager calls take an autograd function; torch.compile sees an operator, since it can trace neither
the CUDA functions inside nor the kernels' launches. Both compute by :mod:`.selective_scan`, and
keep xz, x_proj's output, the ungated scan output and the scan's states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prodial_kernels.kernels.projector.operands import Operands, ProjectionOptions
from prodial_kernels.models.mixers.selective_scan import (
    N_TENSORS,
    ScanKept,
    ScanNeeds,
    ScanOperands,
    ScanOptions,
    scan_forward,
    scan_gradients,
)
from prodial_kernels.ops.autocast import autocast_off
from prodial_kernels.ops.projection import forward as projection_forward


def differentiable_scan(
    xz: Tensor, operands: ScanOperands, options: ScanOptions, *, reverse: bool = False
) -> Tensor:
    """Return the gated output [b, E, l], in the order of xz.

    Args:
        xz: [b, 2E, l], in the dtype of the operands' weights.
        operands: As :func:`~prodial_kernels.models.mixers.selective_scan.scan_operands` gives them.
        options: Likewise.
        reverse: Whether to scan from the last token to the first.
    """
    if not torch.compiler.is_compiling():
        made: Tensor = _Scan.apply(xz, options, reverse, *operands.flat())
        return made
    # An operator takes tensors only; these weights are small.
    x_proj, x_options = _unpacked(operands.x_proj, options.x_proj)
    dt_proj, dt_options = _unpacked(operands.dt_proj, options.dt_proj)
    operands = operands._replace(x_proj=x_proj, dt_proj=dt_proj)
    y, *_ = torch.ops.prodial_kernels.mamba_scan(
        xz, *operands.flat(), *x_options[:4], *dt_options[:4], reverse
    )
    return y


class _Scan(torch.autograd.Function):
    """xz [b, 2E, l] -> y [b, E, l]. See the module's docstring for what is kept."""

    @staticmethod
    def forward(
        ctx: Any, xz: Tensor, options: ScanOptions, reverse: bool, *tensors: Tensor | None
    ) -> Tensor:
        """``tensors``: :meth:`ScanOperands.flat`."""
        y, kept = _scan(xz, tensors, options, reverse)
        # xz itself, one tensor for both directions; upstream keeps a flipped copy for the second.
        ctx.save_for_backward(xz, *kept, *tensors)
        ctx.options, ctx.reverse = options, reverse
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of ``forward``'s arguments; only those asked for."""
        xz, *tensors = ctx.saved_tensors
        kept, operands = tensors[: len(ScanKept._fields)], tensors[len(ScanKept._fields) :]
        needs = ctx.needs_input_grad
        dxz, found = _gradients(
            dy, xz, ScanKept(*kept), operands, ctx.options, ctx.reverse, (needs[0], *needs[3:])
        )
        return tuple(
            gradient if needed else None
            for gradient, needed in zip((dxz, None, None, *found), needs, strict=True)
        )


def _scan(
    xz: Tensor, tensors: Sequence[Tensor | None], options: ScanOptions, reverse: bool
) -> tuple[Tensor, ScanKept]:
    with autocast_off(xz.device.type):
        y, kept = scan_forward(_oriented(xz, reverse), ScanOperands.unflatten(tensors), options)
    return (y.flip(-1) if reverse else y), kept


def _gradients(
    dy: Tensor,
    xz: Tensor,
    kept: ScanKept,
    tensors: Sequence[Tensor | None],
    options: ScanOptions,
    reverse: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Return the gradients of xz and of ``tensors``; ``needs`` says of each whether it is asked."""
    with autocast_off(xz.device.type):
        dxz, found = scan_gradients(
            [_oriented(dy, reverse)], _oriented(xz, reverse), kept,
            ScanOperands.unflatten(tensors), options, ScanNeeds.of(needs[0], needs[1:]),
        )  # fmt: skip
        return (dxz.flip(-1) if reverse and needs[0] else dxz), found


def _oriented(tensor: Tensor, reverse: bool) -> Tensor:
    """The tensor in the direction of the scan, contiguous along it."""
    # flip keeps the order of the strides.
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return tensor.flip(-1) if reverse else tensor


def _unpacked(operands: Operands, options: ProjectionOptions) -> tuple[Operands, ProjectionOptions]:
    if options.packed is None:
        return operands, options
    if options.compute != "same":
        raise ValueError(
            f"compute={options.compute!r} of x_proj and dt_proj is not for torch.compile, which "
            "takes a scan as one operator; leave them out of target_modules, or do not compile"
        )
    dense = options.packed.dense(operands.weight.dtype)
    return operands._replace(weight=dense), options._replace(packed=None)


# --- The operators, registered when a mixer is adapted: flat, without None among the results. ----

_TENSORS = ", ".join(f"Tensor? t{number}" for number in range(N_TENSORS))
_OPTIONS = ", ".join(
    f"str {name}_impl, float {name}_scaling, float {name}_dropout, str {name}_diagonal"
    for name in ("x", "dt")
)
_KEPT = ", ".join(f"Tensor {name}" for name in ScanKept._fields)
_N_KEPT = len(ScanKept._fields)

_library = torch.library.Library("prodial_kernels", "FRAGMENT")
_library.define(
    f"mamba_scan(Tensor xz, {_TENSORS}, {_OPTIONS}, bool reverse) -> (Tensor y, {_KEPT})"
)
_library.define(
    f"mamba_scan_backward(Tensor dy, Tensor xz, {_KEPT}, {_TENSORS}, {_OPTIONS}, bool reverse, "
    "bool[] needs) -> Tensor[]"
)


def _read(flat: Sequence[Any]) -> tuple[list[Tensor | None], ScanOptions, bool]:
    """Tensors, options and direction, as they lie in both operators' arguments."""
    tensors, scalars = list(flat[:N_TENSORS]), flat[N_TENSORS:]
    options = ScanOptions(ProjectionOptions(*scalars[:4]), ProjectionOptions(*scalars[4:8]))
    return tensors, options, scalars[8]


def _operator(xz: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    y, kept = _scan(xz, *_read(flat))
    return y, *[xz.new_empty(0) if part is None else part for part in kept]


def _operator_fake(xz: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    tensors, options, _ = _read(flat)
    operands = ScanOperands.unflatten(tensors)
    batch, both, length = xz.shape
    inner, state = both // 2, operands.A.shape[1]

    def empty(rows: int) -> Tensor:
        return xz.new_empty(batch, rows, length)

    dbc = empty(operands.x_proj.weight.shape[0])
    chunks = (length + 2047) // 2048
    states = operands.A.new_empty(batch, inner, chunks, 2 * state)
    x_h = _low_rank(xz, operands.x_proj, options.x_proj)
    dt_h = _low_rank(xz, operands.dt_proj, options.dt_proj)
    return empty(inner), dbc, empty(inner), states, x_h, dt_h


def _low_rank(xz: Tensor, operands: Operands, options: ProjectionOptions) -> Tensor:
    """The shape of what :func:`~prodial_kernels.ops.projection.project` returns beside Y."""
    x = xz.new_empty(xz.shape[0] * xz.shape[2], operands.weight.shape[1])
    if options.impl == "plain":
        return xz.new_empty(0)
    h = projection_forward(x, operands, options)[1]
    return xz.new_empty(0) if h is None else h


def _operator_backward(dy: Tensor, xz: Tensor, *flat: Any) -> list[Tensor]:
    needs: Sequence[bool] = flat[-1]
    dbc, out, states, *low_rank = flat[:_N_KEPT]
    kept = ScanKept(dbc, out, states, *[h if h.numel() else None for h in low_rank])
    dxz, found = _gradients(dy, xz, kept, *_read(flat[_N_KEPT:-1]), needs)
    given = zip((dxz, *found), needs, strict=True)
    return [g if need and g is not None else dy.new_empty(0) for g, need in given]


def _operator_backward_fake(dy: Tensor, xz: Tensor, *flat: Any) -> list[Tensor]:
    tensors = flat[_N_KEPT : _N_KEPT + N_TENSORS]
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if need and tensor is not None
        else dy.new_empty(0)
        for tensor, need in zip((xz, *tensors), flat[-1], strict=True)
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    xz, *flat = inputs
    ctx.save_for_backward(xz, *output[1:], *flat[:N_TENSORS])
    ctx.scalars = flat[N_TENSORS:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    n_scalars = len(ctx.scalars)
    needs = ctx.needs_input_grad[: 1 + N_TENSORS]
    if dy is None:
        return (None,) * (1 + N_TENSORS + n_scalars)
    xz, *tensors = ctx.saved_tensors
    found = torch.ops.prodial_kernels.mamba_scan_backward(dy, xz, *tensors, *ctx.scalars, needs)
    gradients = [g if need else None for g, need in zip(found, needs, strict=True)]
    return (*gradients, *[None] * n_scalars)


# The CPU's are for tests, where something stands in for the CUDA functions.
for _key in ("CUDA", "CPU"):
    _library.impl("mamba_scan", _operator, _key)
    _library.impl("mamba_scan_backward", _operator_backward, _key)
torch.library.register_fake("prodial_kernels::mamba_scan", _operator_fake, lib=_library)
torch.library.register_fake(
    "prodial_kernels::mamba_scan_backward", _operator_backward_fake, lib=_library
)
torch.library.register_autograd(
    "prodial_kernels::mamba_scan", _differentiate, setup_context=_setup, lib=_library
)
