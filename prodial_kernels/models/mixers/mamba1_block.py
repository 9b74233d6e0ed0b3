"""Mamba-1's fused block with its projectors inside: one autograd function per mixer.

The order of the work is upstream's ``MambaInnerFn``: in_proj, the scan of
:mod:`.selective_scan`, out_proj. What differs:

* ``in_proj`` and ``out_proj`` run adapted. The input of ``out_proj`` is not kept: it is
  ``out ⊙ silu(z)``, recomputed in backward, as upstream does for its own weight gradient.
* A network beside ``out_proj`` (ParallelAdapter) reads what that reads; see :mod:`.branch`.
* Only gradients that are asked for are computed; upstream forms the dense weight gradients of
  out_proj, x_proj and dt_proj in every backward.

Kept: xz, what the scan keeps, and either the block's input X or its output Y. X is recomputed where
the norm before the block allows it; then Y, of the same size, is kept for the gradient of
out_proj's scale, which otherwise costs that product once more. With ``recompute_xz`` xz is
recomputed too, and Y not kept; with ``keep_output`` it always is. The first operands of in_proj's
backward are prefetched beside the product of ``out_proj`` and the scan (``ops/prefetch.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prodial_kernels.kernels.projector.operands import Kept, Needs, Operands, ProjectionOptions
from prodial_kernels.linear import ProdialLinear
from prodial_kernels.models.mixers.branch import (
    N_BRANCH,
    Branch,
    add_branch,
    branch_gradients,
    branch_operands,
)
from prodial_kernels.models.mixers.inserted.tokens import (
    in_sequence,
    inserted_tokens,
    layout,
    overwritten,
    take_gradient,
    write,
)
from prodial_kernels.models.mixers.projection import operands_of, placeholder
from prodial_kernels.models.mixers.recomputed_norm import norm_recomputation
from prodial_kernels.models.mixers.scan_function import differentiable_scan
from prodial_kernels.models.mixers.selective_scan import (
    N_OPERANDS,
    N_TENSORS,
    ScanKept,
    ScanNeeds,
    ScanOperands,
    ScanOptions,
    scan_forward,
    scan_gradients,
    scan_operands,
)
from prodial_kernels.ops.autocast import autocast_off
from prodial_kernels.ops.layout import gated_channels
from prodial_kernels.ops.operators import scaled_weight
from prodial_kernels.ops.prefetch import Prefetch
from prodial_kernels.ops.projection import (
    can_prefetch,
    project,
    project_backward,
    takes_output,
)

MAMBA_PARTS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj", "A_log", "D")
"""What a Mamba-1 mixer consists of, and all that :func:`fused_mamba` computes with."""

RECOMPUTE_XZ = "prodial_recompute_xz"
"""Attribute of a mixer; True trades a product of each projector per step for memory: xz, and Y."""

KEEP_OUTPUT = "prodial_keep_output"
"""Attribute of a mixer, Mamba-2's as well; True keeps Y whatever else is kept, as blocks that run
again in backward can: what they keep is there for their own backward only."""


class Options(NamedTuple):
    """What of the block is not a tensor.

    Attributes:
        in_proj: Of that projection.
        scan: Of the projections in the scan.
        out_proj: Of that projection.
        recompute_xz: Whether backward recomputes xz.
        recompute_hidden: Recomputes the block's input in backward; None to keep it.
        keep_output: Whether Y is kept in any case.
        runs: (first, length) of what of in_proj's output the inserted tokens overwrite.
    """

    in_proj: ProjectionOptions
    scan: ScanOptions
    out_proj: ProjectionOptions
    recompute_xz: bool
    recompute_hidden: Callable[[], Tensor] | None
    keep_output: bool = False
    runs: tuple[tuple[int, int], ...] = ()


def fused_mamba(mixer: Any, hidden: Tensor) -> Tensor:
    """Compute ``mixer(hidden)`` for a mamba_ssm ``Mamba``: [b, l, d] -> [b, l, d].

    Raises:
        RuntimeError, TypeError, ValueError: As from calling the projectors.
    """
    if torch.compiler.is_compiling():
        return _traceable(mixer, hidden)
    in_proj, in_options = operands_of(mixer.in_proj, hidden)
    scan, scan_options = scan_operands(mixer, hidden)
    out_proj, out_options = operands_of(
        mixer.out_proj, placeholder(hidden, mixer.out_proj.in_features)
    )
    hidden = hidden.to(in_proj.weight.dtype)
    options = Options(
        in_options, scan_options, out_options, getattr(mixer, RECOMPUTE_XZ, False),
        norm_recomputation(hidden), getattr(mixer, KEEP_OUTPUT, False),
    )  # fmt: skip
    inserted, columns, longer = inserted_tokens(mixer), None, None
    if inserted is not None:
        longer, columns = (
            layout(hidden.shape[1], inserted, rounded=True),
            in_sequence(mixer, inserted, 0),
        )
        hidden, again = longer.lengthened(hidden), options.recompute_hidden
        lengthened = None if again is None else lambda: longer.lengthened(again())
        options = options._replace(runs=longer.runs[0], recompute_hidden=lengthened)
    branch = branch_operands(mixer.out_proj, hidden, in_proj.weight.dtype)
    y: Tensor = MambaBlock.apply(
        hidden, options, *scan.flat(), *in_proj, *out_proj, *branch, columns
    )
    return y if longer is None else longer.shortened(y)


def _traceable(mixer: Any, hidden: Tensor) -> Tensor:
    """The same for torch.compile: projectors that it traces, and the scan as one operator.

    What it keeps is the compiler's choice: X, and the input of out_proj too.
    """
    inserted, longer = inserted_tokens(mixer), None
    if inserted is not None:
        longer = layout(hidden.shape[1], inserted, rounded=True)
        hidden = longer.lengthened(hidden)
    if isinstance(mixer.in_proj, ProdialLinear):
        xz = mixer.in_proj(hidden, channel_first=True)
    else:
        xz = mixer.in_proj(hidden).mT.contiguous()
    if longer is not None:
        xz = overwritten(xz, in_sequence(mixer, inserted, 0), longer.runs[0])
    operands, options = scan_operands(mixer, hidden)
    xz = xz.to(operands.x_proj.weight.dtype)
    y: Tensor = mixer.out_proj(differentiable_scan(xz, operands, options).mT)
    return y if longer is None else longer.shortened(y)


_SCAN = 2
_IN_PROJ = _SCAN + N_TENSORS
_OUT_PROJ = _IN_PROJ + N_OPERANDS
_BRANCH = _OUT_PROJ + N_OPERANDS
_TOKENS = _BRANCH + N_BRANCH
_SCALE_OF_OUT_PROJ = _OUT_PROJ + Operands._fields.index("scale_deviation")


class MambaBlock(torch.autograd.Function):
    """X [b, l, d] -> Y [b, l, d]. See the module's docstring for what is kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, options: Options, *tensors: Tensor | None) -> Tensor:
        """``tensors``: :meth:`ScanOperands.flat`, both projectors' ``Operands``, ``Branch``.

        And last the tokens, [2E, k], that overwrite columns of xz; None for none.
        """
        scan, in_proj, out_proj, branch = _operands(tensors)
        room = options.recompute_hidden is not None and not options.recompute_xz
        keeps_y = (
            (room or options.keep_output)
            and takes_output(out_proj, options.out_proj)
            and ctx.needs_input_grad[_SCALE_OF_OUT_PROJ]
        )
        with autocast_off(hidden.device.type):
            xz, in_h = project(hidden, in_proj, options.in_proj, channel_first=True)
            if tensors[-1] is not None:
                write(xz, tensors[-1], options.runs)
            gated, kept = scan_forward(xz, scan, options.scan)
            y, out_h = project(gated.mT, out_proj, options.out_proj)
            own = y
            if branch.down is not None and keeps_y:
                # The gradient of the scale is made from out_proj's own output.
                own, y = y, y.clone()
            y, beside = add_branch(y, gated, branch)
            del gated
        ctx.save_for_backward(
            hidden if options.recompute_hidden is None else None,
            None if options.recompute_xz else xz, own if keeps_y else None, in_h, out_h, beside,
            *kept,
            *tensors,
        )  # fmt: skip
        ctx.options = options
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of ``forward``'s arguments; only those asked for."""
        hidden, xz, y, in_h, out_h, beside, *tensors = ctx.saved_tensors
        kept = ScanKept(*tensors[: len(ScanKept._fields)])
        scan, in_proj, out_proj, branch = _operands(tensors[len(ScanKept._fields) :])
        options: Options = ctx.options
        asked = _Asked.of(ctx.needs_input_grad)
        with autocast_off(dy.device.type):
            if xz is None:
                hidden = _hidden(hidden, options)
                xz, in_h = project(hidden, in_proj, options.in_proj, channel_first=True)
                if tensors[-1] is not None:
                    write(xz, tensors[-1], options.runs)

            def in_proj_input() -> Tensor | None:
                return _hidden(hidden, options) if asked.in_proj.input else hidden

            prefetch = None
            if any(asked.in_proj) and can_prefetch(in_proj, options.in_proj):
                # Beside out_proj's product and the scan, which leave bandwidth unused.
                prefetch = Prefetch(dy.device, lambda: (scaled_weight(in_proj), in_proj_input()))
            gated = None
            if asked.out_proj.input or branch.down is not None:
                gated = gated_channels(kept.out, xz.chunk(2, dim=1)[1]).mT
            dgated, *d_out_proj = project_backward(
                dy, gated, Kept(y, out_h), out_proj, options.out_proj, asked.out_proj,
                channel_first=True,
            )  # fmt: skip
            d_branch: Sequence[Tensor | None] = [None] * N_BRANCH
            if gated is not None:
                d_branch = branch_gradients(dy, gated.mT, beside, branch, dgated)
            # Of a block that has run again, y has no other owner.
            del gated, y
            if dgated is None:
                return (*[None] * _OUT_PROJ, *d_out_proj, None, *d_branch, None)
            if prefetch is not None:
                prefetch.start()
            given = [dgated]
            del dgated
            dxz, d_scan = scan_gradients(given, xz, kept, scan, options.scan, asked.scan)
            d_hidden = d_tokens = None
            d_in_proj: list[Tensor | None] = [None] * (N_OPERANDS - 1)
            if tensors[-1] is not None and asked.scan.x_proj.x:
                d_tokens = take_gradient(dxz, options.runs).to(tensors[-1].dtype)
            if any(asked.in_proj):
                scaled, hidden = (None, in_proj_input()) if prefetch is None else prefetch.take()
                d_hidden, *d_in_proj = project_backward(
                    dxz.mT, hidden, Kept(xz.mT, in_h, scaled), in_proj, options.in_proj,
                    asked.in_proj,
                )  # fmt: skip
        gradients = (
            d_hidden, None, *d_scan, *d_in_proj, None, *d_out_proj, None, *d_branch, d_tokens
        )  # fmt: skip
        return tuple(
            gradient if needed else None
            for gradient, needed in zip(gradients, ctx.needs_input_grad, strict=True)
        )


class _Asked(NamedTuple):
    """Which gradients each part of the block has to give; ``x`` where something before it asks."""

    scan: ScanNeeds
    in_proj: Needs
    out_proj: Needs

    @classmethod
    def of(cls, flags: tuple[bool, ...]) -> _Asked:
        """Read ``ctx.needs_input_grad``, whose order is that of ``MambaBlock.forward``."""
        own_in = flags[_IN_PROJ : _OUT_PROJ - 1]
        xz = flags[0] or any(own_in) or flags[_TOKENS]
        scan = ScanNeeds.of(xz, flags[_SCAN:_IN_PROJ])
        return cls(
            scan, Needs(flags[0], *own_in), Needs(scan.output, *flags[_OUT_PROJ : _BRANCH - 1])
        )


def _hidden(kept: Any, options: Options) -> Any:
    """The block's input, recomputed where it was not kept."""
    again = options.recompute_hidden
    return again() if kept is None and again is not None else kept


def _operands(tensors: Sequence[Any]) -> tuple[ScanOperands, Operands, Operands, Branch]:
    scan = ScanOperands.unflatten(tensors[:N_TENSORS])
    middle, end = N_TENSORS + N_OPERANDS, N_TENSORS + 2 * N_OPERANDS
    in_proj, out_proj = Operands(*tensors[N_TENSORS:middle]), Operands(*tensors[middle:end])
    return scan, in_proj, out_proj, Branch(*tensors[end : end + N_BRANCH])
