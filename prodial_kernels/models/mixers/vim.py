"""Vision Mamba's bidirectional mixer: one ``in_proj``, two scans, one ``out_proj``.

Vim's own package (a fork that is also called mamba_ssm) multiplies by ``in_proj.weight`` in every
path, and by ``out_proj.weight`` in the fused ones; its unfused path drops the backward direction.
So an adapted mixer of Vim's runs :func:`bidirectional_mamba`, on which
:class:`prodial_kernels.VisionMamba` is built too. Vim is recognised by structure and never
imported here.

MambaVision's mixer calls its projectors and needs no policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from prodial_kernels.linear import ProdialLinear
from prodial_kernels.models.mixers.arguments import cache_among, named_arguments, split_first
from prodial_kernels.models.mixers.inserted.tokens import inserted_tokens, layout, with_tokens
from prodial_kernels.models.mixers.mamba1_block import MAMBA_PARTS
from prodial_kernels.models.mixers.projection import calling_projectors, is_changed
from prodial_kernels.models.mixers.selective_scan import BACKWARD, FORWARD, Direction
from prodial_kernels.models.mixers.structure import forward_of, names_in, unknown_in
from prodial_kernels.models.mixers.vim_scan import directed_scan
from prodial_kernels.models.patch_point import AdaptedMixer

# By the mixer's bimamba_type. "v1" scans the forward convolution's output both ways.
_DIRECTIONS: dict[str, tuple[Direction, ...]] = {"v2": (FORWARD, BACKWARD), "none": (FORWARD,)}


# Of "v2", and what else upstream's forward may read.
_BACKWARD_PARTS = BACKWARD[:5]
_KNOWN = ("act", "gamma", "step", "_get_states_from_cache", *_BACKWARD_PARTS)


def bidirectional_mamba(
    mixer: Any,
    hidden_states: Tensor,
    *,
    average: bool,
    directions: tuple[Direction, ...] = (FORWARD, BACKWARD),
    scan: str = "auto",
) -> Tensor:
    """Compute a bidirectional mixer, its projectors called as modules.

    Args:
        mixer: Holds ``in_proj``, ``out_proj`` and the parts that ``directions`` name.
        hidden_states: [b, l, d].
        average: Whether to divide the sum of the directions by their number.
        directions: The scans to run.
        scan: As in :func:`~prodial_kernels.models.mixers.vim_scan.directed_scan`, which also says
            what is raised.

    Returns:
        [b, l, d].
    """
    tokens, longer = inserted_tokens(mixer), None
    if tokens is not None:
        longer = layout(hidden_states.shape[1], tokens, directions=len(directions))
        hidden_states = longer.lengthened(hidden_states)
    if isinstance(mixer.in_proj, ProdialLinear):
        xz = mixer.in_proj(hidden_states, channel_first=True)
    else:
        xz = mixer.in_proj(hidden_states).mT.contiguous()
    given = [xz] * len(directions)
    if longer is not None:
        given = with_tokens(mixer, tokens, xz, longer)
    y = directed_scan(mixer, given[0], directions[0], scan)
    for direction, own in zip(directions[1:], given[1:], strict=True):
        y = y + directed_scan(mixer, own, direction, scan)
    if average:
        y = y / len(directions)
    mixed = mixer.out_proj(y.mT)
    return mixed if longer is None else longer.shortened(mixed)


def recognises(mixer: nn.Module) -> bool:
    """Whether ``mixer`` is Vim's: by its ``bimamba_type`` and by what its forward does."""
    names = names_in(forward_of(mixer)[1])
    return {"bimamba_type", "mamba_inner_fn_no_out_proj", "out_proj"} <= names and (
        all(hasattr(mixer, name) for name in ("bimamba_type", "in_proj", "out_proj"))
    )


def check(mixer: Any, targets: frozenset[str]) -> None:
    """Refuse what cannot be adapted.

    Raises:
        ValueError: A ``bimamba_type`` other than ``"v2"`` and ``"none"``, or ``"v2"`` without
            the fast path, which in Vim's code is another function.
    """
    subject = f"{sorted(targets)} of a {type(mixer).__name__} with bimamba_type="
    if mixer.bimamba_type not in _DIRECTIONS:
        raise ValueError(
            f"{subject}{mixer.bimamba_type!r} cannot be adapted: only {sorted(_DIRECTIONS)} can"
        )
    if mixer.bimamba_type == "v2" and not mixer.use_fast_path:
        raise ValueError(
            f"{subject}'v2' and use_fast_path=False, which scans forwards only; set "
            "use_fast_path=True, as the published models are used"
        )
    parts = [*MAMBA_PARTS, *(_BACKWARD_PARTS if mixer.bimamba_type == "v2" else ())]
    problem = unknown_in(mixer, forward_of(mixer)[1], parts=parts, known=_KNOWN)
    if problem is not None:
        raise ValueError(
            f"{subject}{mixer.bimamba_type!r}: {problem} to prodial_kernels, which computes the "
            "mixer by itself and is tested with the code that Vim published in 2024"
        )


def adapt_mixers(model: nn.Module) -> list[AdaptedMixer]:
    """Give every mixer of Vim's in ``model`` that holds an adapted projector its path."""
    return [
        AdaptedMixer(mixer, {"forward": vim_forward})
        for mixer in model.modules()
        if recognises(mixer) and is_changed(mixer)
    ]


def vim_forward(mixer: Any, upstream: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """``forward`` of Vim's mixer: [b, l, d] -> [b, l, d].

    Raises:
        ValueError: A bidirectional mixer with ``inference_params``: it cannot go token by token.
            Or an argument that is unknown.
    """
    kind = mixer.bimamba_type
    cached = cache_among(named_arguments(upstream, args, kwargs))
    if cached is not None:
        if kind != "none":
            raise ValueError(
                f"{cached} with bimamba_type={kind!r}: a bidirectional mixer needs the whole "
                f"sequence; pass {cached}=None"
            )
        return upstream(calling_projectors(mixer), *args, **kwargs)
    hidden_states, positional, named = split_first(upstream, args, kwargs)
    unknown = [value for value in (*positional, *named.values()) if value is not None]
    if unknown:
        raise ValueError(
            "a mixer of Vim's was called with more than its input, of which its adapted path "
            "knows nothing; call it with the hidden states only"
        )
    # Forks spell it in two ways.
    average = getattr(mixer, "if_divide_out", getattr(mixer, "if_devide_out", False))
    out = bidirectional_mamba(mixer, hidden_states, average=average, directions=_DIRECTIONS[kind])
    return out if mixer.init_layer_scale is None else out * mixer.gamma
