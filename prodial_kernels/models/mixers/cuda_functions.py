"""The CUDA functions of mamba-ssm and causal-conv1d, which are called by position.

They are what upstream's own autograd functions call, and no public interface: another number of
arguments is an error that says which releases are tested.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from prodial_kernels import upstream


def kernels_available() -> bool:
    """Whether the CUDA functions of causal-conv1d and mamba-ssm can be imported."""
    return all(map(find_spec, ("causal_conv1d", "selective_scan_cuda")))


# torch.compile takes the answer and traces nothing; see ops/implementation.py.
kernels_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def scan(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``out, states, out ⊙ silu(z)``, each [b, E, l] but the states.

    Args:
        inputs: u, delta, A, B, C, D, z, delta's bias, and whether delta goes through softplus.
    """
    import selective_scan_cuda

    out, states, gated = _call("mamba_ssm", selective_scan_cuda, "fwd", inputs)
    return out, states, gated


def scan_backward(*inputs: Any) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D and delta's bias; that of z is written to ``dz``.

    Args:
        inputs: Those of :func:`scan` but the last, the output's gradient, states, out, ``dz``,
            whether delta went through softplus, and whether to compute the output again.
    """
    import selective_scan_cuda

    return tuple(_call("mamba_ssm", selective_scan_cuda, "bwd", inputs)[:7])


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``silu(conv(x))``, causal and per channel: [b, E, l] -> contiguous [b, E, l]."""
    from causal_conv1d import cpp_functions

    inputs = (x, weight, bias, None, None, None, True)
    made: Tensor = _call("causal_conv1d", cpp_functions, "causal_conv1d_fwd_function", inputs)
    return made


def convolve_backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, du: Tensor, dx: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of weight and bias from ``du`` [b, E, l]; that of x is written to ``dx``."""
    from causal_conv1d import cpp_functions

    inputs = (x, weight, bias, du, None, None, None, dx, False, True)
    _, d_weight, d_bias, _ = _call(
        "causal_conv1d", cpp_functions, "causal_conv1d_bwd_function", inputs
    )
    return d_weight, d_bias


def _call(library: str, module: Any, name: str, inputs: tuple[Any, ...]) -> Any:
    function: Callable[..., Any] | None = getattr(module, name, None)
    if function is None:
        raise upstream.error(library, f"{module.__name__} has no {name}()")
    try:
        return function(*inputs)
    except TypeError as error:
        raise upstream.error(
            library, f"{module.__name__}.{name}() takes other arguments than it did ({error})"
        ) from error
