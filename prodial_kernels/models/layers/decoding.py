"""The logits behind a growing text, token by token, equal to those of one forward over all of it.

A cache saves reading the text again for every token. Models of transformers (5.17 to 5.24) have
ways to use one that silently compute something else, and none of them is taken here:

* Mamba-1 (``mamba``, ``falcon_mamba``, ``jamba``, ``zamba``) forgets the state before when it is
  given several tokens with a cache. So the text is read at once into an empty cache, and after
  that tokens go in one by one; another text begins with another cache.
* ``bamba`` counts positions from 0 again in every call. So positions are always given.
* Mamba-2's step leaves out the limits of dt that reading a text applies (``zamba2`` and
  ``nemotron_h`` always have one). So the step clamps dt here, see :func:`clamp_steps`.

What is left to trust is tested on the text itself: see :class:`Reader`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prodial_kernels.models.layers.head import run_model
from prodial_kernels.models.mixers.arguments import is_cache
from prodial_kernels.models.mixers.inserted.upstream import with_inserted
from prodial_kernels.models.mixers.structure import global_of, names_in
from prodial_kernels.models.patch_point import AdaptedMixer, rebound
from prodial_kernels.upstream import UpstreamError

STEP = "mamba2_selective_state_update"
"""Name of the function by which transformers' Mamba-2 mixers take one token."""

# A step and a forward over the whole text differ by rounding alone. In 16 bits and over many layers
# that is some percent of the logits, and on a GPU mamba_ssm's kernels multiply fp32 in TF32 (0.3%
# off on an H200); the wrong ways are off by as much as the text matters.
_TOLERANCE = {"cpu": {torch.float64: 1e-6, torch.float32: 1e-3}, "cuda": {torch.float32: 2e-2}}
_TOLERANCE_16_BITS = 0.1
_PROBE_STEPS = 4
_PROBE_LENGTH = 48


class Reader:
    """A text as a causal language model reads it: the logits of what comes next.

    Before the first token is generated, the end of the text is read once token by token and once
    as a whole. If the logits differ by more than rounding, the model's cache is not used: every
    token then costs reading the whole text, and :attr:`cached` is False.

    Attributes:
        cached: Whether tokens after the first text go in one by one. False where the model returns
            no cache, or one that changes what it computes.
        why: What is wrong with the cache; None where it is used.
    """

    def __init__(self, model: nn.Module) -> None:
        """Read nothing yet; the model stays in its mode until :meth:`read` runs it."""
        self.model, self.why = _called(model)
        self._parameters = inspect.signature(self.model.forward).parameters
        kinds = {parameter.kind for parameter in self._parameters.values()}
        if "use_cache" not in self._parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
            self.why = "it has no cache"
        self.cached = self.why is None
        self._text: list[int] = []
        self._cache: dict[str, Any] = {}

    def read(self, tokens: Sequence[int]) -> Tensor:
        """Read more of the text and return the logits of the next token, float32 ``[vocabulary]``.

        The first call begins the text; every further one must bring one token.

        Args:
            tokens: Token ids; at least one.

        Raises:
            ValueError: No token, or several after the first call.
        """
        first = not self._text
        if not tokens or (not first and len(tokens) > 1):
            raise ValueError(
                "tokens must be the whole text in the first call and one token in every other, got "
                f"{len(tokens)}"
            )
        self._text += [int(token) for token in tokens]
        if first and self.cached:
            self._check()
        if not self.cached:
            return self._whole(self._text)[-1]
        return self._step(self._text if first else self._text[-1:], len(self._text))

    def _check(self) -> None:
        """Compare steps with the whole on the end of the text, and on as much more as it takes."""
        probe = self._text[-_PROBE_LENGTH:]
        while len(probe) < 2 * _PROBE_STEPS:
            probe = probe + probe
        n = len(probe) - _PROBE_STEPS
        self._step(probe[:n], n)
        steps = []
        for i in range(n, len(probe)):
            if not self.cached:
                return
            steps.append(self._step(probe[i : i + 1], i + 1))
        self._cache = {}
        found = torch.stack(steps)
        expected = self._whole(probe)[-_PROBE_STEPS:]
        errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
        first = next(self.model.parameters())
        tolerance = _TOLERANCE.get(first.device.type, {}).get(first.dtype, _TOLERANCE_16_BITS)
        error = float(errors.median())
        # "not <=" rather than ">": a NaN must fail.
        if not error <= tolerance:
            self._give_up(
                f"its logits by a cache differ by {error:.1%} from those of the whole text"
            )

    def _step(self, tokens: list[int], length: int) -> Tensor:
        """Give tokens, which end the first ``length`` of the text, to the model and its cache."""
        places = torch.arange(length - len(tokens), length)
        output = self._call(tokens, places, use_cache=True, **self._cache)
        self._cache = {name: value for name, value in output.items() if is_cache(name, value)}
        if len(self._cache) != 1 or next(iter(self._cache)) not in self._parameters:
            self._give_up("it returns no cache that it takes back")
        logits: Tensor = output.logits[0, -1].float()
        return logits

    def _whole(self, tokens: list[int]) -> Tensor:
        output = self._call(tokens, torch.arange(len(tokens)))
        logits: Tensor = output.logits[0].float()
        return logits

    def _call(self, tokens: list[int], places: Tensor, **inputs: Any) -> Any:
        model: Any = self.model
        device = model.get_input_embeddings().weight.device
        ids = torch.tensor([tokens], device=device)
        if "position_ids" in self._parameters:
            inputs["position_ids"] = places[None].to(device)
        if "logits_to_keep" in self._parameters:
            inputs["logits_to_keep"] = _PROBE_STEPS
        if "use_cache" in inputs:
            return model(input_ids=ids, **inputs)
        return run_model(model, ids, **inputs)

    def _give_up(self, why: str) -> None:
        self.cached, self.why, self._cache = False, why, {}


@contextmanager
def clamp_steps(model: nn.Module) -> Iterator[None]:
    """While this is open, Mamba-2's steps of one token keep to the limits of dt, as reading does.

    For mixers of transformers whose ``time_step_limit`` excludes anything. One whose forward is
    built otherwise is left alone: :class:`Reader` finds out whether it is right.
    """
    changed: list[AdaptedMixer] = []
    try:
        for mixer in list(model.modules()):
            low, high = getattr(mixer, "time_step_limit", None) or (0.0, math.inf)
            if (low > 0 or high < math.inf) and _forward_with_step(mixer) is not None:
                changed.append(AdaptedMixer(mixer, {"forward": _clamped}))
        yield
    finally:
        for change in reversed(changed):
            change.remove()


def biased_projections(model: nn.Module) -> list[str]:
    """Return the input projections, by name, that give padding a value other than 0.

    transformers masks the input of ``in_proj``, not its output, so behind padding on the left the
    convolution begins with the bias instead of nothing: texts padded so are read otherwise than
    alone. Without a bias they are not, and on the right padding comes behind every token.
    """
    return [
        f"{path}.in_proj".lstrip(".")
        for path, mixer in model.named_modules()
        if hasattr(mixer, "conv1d")
        and getattr(getattr(mixer, "in_proj", None), "bias", None) is not None
    ]


def _forward_with_step(mixer: nn.Module) -> Callable[..., Any] | None:
    """Return transformers' forward of a mixer that takes single tokens by :data:`STEP`, if any."""
    for cls in type(mixer).__mro__:
        forward = vars(cls).get("forward")
        if cls.__module__.startswith("transformers.") and STEP in names_in(forward):
            try:
                rebound(forward)
            except UpstreamError:
                return None
            return forward
    return None


def _clamped(mixer: Any, upstream: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # Below any other policy: these are for training, and in evaluation call the projectors too.
    forward = upstream if mixer.training else _forward_with_step(mixer)
    if forward is None or mixer.training:
        return upstream(mixer, *args, **kwargs)
    step = partial(_clamped_step, global_of(forward, STEP), mixer.time_step_limit)
    return with_inserted(mixer, forward, mixer, args, kwargs, rebound(forward, **{STEP: step}))


def _clamped_step(
    function: Callable[..., Tensor],
    limits: tuple[float, float],
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    *args: Any,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Take one token, state [b, h, p, n] and dt [b, h, p], with dt kept within its limits."""
    # The same for all of a head's features, which kernels see by the strides.
    narrow = dt[..., :1].float()
    if dt_bias is not None:
        narrow = narrow + dt_bias[..., :1].float()
    if dt_softplus:
        narrow = nn.functional.softplus(narrow)
    dt = narrow.clamp(*limits).expand(dt.shape)
    none = torch.zeros_like(dt[0, :, :1]).expand(dt.shape[1:])
    return function(state, hidden_states, dt, *args, dt_bias=none, dt_softplus=False, **kwargs)


def _called(model: nn.Module) -> tuple[nn.Module, str | None]:
    """Return what is to be called, of PEFT's wrappers the model in them; and why not by a cache."""
    configs: Any = getattr(model, "peft_config", None)
    base_of: Any = getattr(model, "get_base_model", None)
    if configs is None or base_of is None:
        return model, None
    if any(getattr(config, "is_prompt_learning", False) for config in configs.values()):
        # PEFT (0.21 with transformers 5.24) puts the prompt before every token that a cache takes.
        return model, "PEFT's prompt tuning computes something else with a cache"
    base: nn.Module = base_of()
    return base, None
