"""Affix-tuning: what it puts into mixers, for ``models/mixers/inserted/`` to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prodial_kernels.linear import weight_like
from prodial_kernels.methods import AffixTuning
from prodial_kernels.models.methods.base import Addition, Site, added, switched_off
from prodial_kernels.models.methods.learned_tokens import (
    drawn_embedding,
    drawn_linear,
    encoded,
    names,
)
from prodial_kernels.models.mixers import hf, mamba_ssm, vim
from prodial_kernels.models.mixers.inserted.tokens import AFFIX
from prodial_kernels.models.placements import is_mixer
from prodial_kernels.models.vision_mamba.mixer import BidirectionalMamba
from prodial_kernels.module_tree import module_paths

_KIND = "affix"
_TOKENS, _W2, _B2 = names(_KIND, "tokens", "w2", "b2")
_NETWORK = names(_KIND, "embedding", "w1", "b1")


class Affix:
    """The tokens of one mixer, as :class:`~…inserted.tokens.InsertedTokens` asks for them.

    It holds no tensor: these are parameters of the mixer, and of the model where there is a
    network. ``of_model`` is that model.
    """

    def __init__(self, method: AffixTuning, sets: int, of_model: nn.Module | None) -> None:
        """Stand for ``sets`` sets of tokens; ``of_model`` holds the network, if there is one."""
        self.count, self.position = method.tokens, method.position
        self.sets = sets
        self.of_model = of_model

    @property
    def shared(self) -> bool:
        """Whether both directions read the same tokens."""
        return self.sets == 1

    def enabled(self, mixer: nn.Module) -> bool:
        """Whether they are inserted now."""
        return not switched_off(mixer)

    def columns(self, mixer: nn.Module, direction: int) -> Tensor:
        """Return a direction's tokens, [features, k]."""
        own = 0 if self.shared else direction
        if self.of_model is None:
            tokens: Any = added(mixer, _TOKENS)
            return tokens[own].mT
        weight: Any = added(mixer, _W2)
        bias: Any = added(mixer, _B2)
        return F.linear(encoded(self.of_model, _KIND), weight[own], bias[own]).mT


class _MixerAddition(Addition):
    """An :class:`Addition` to a mixer that inserts tokens until it is removed."""

    def __init__(
        self, mixer: nn.Module, method: AffixTuning, tensors: dict[str, Tensor], affix: Affix
    ) -> None:
        super().__init__(mixer, method, tensors)
        vars(mixer)[AFFIX] = affix

    def remove(self) -> None:
        """Restore the mixer."""
        vars(self.module).pop(AFFIX, None)
        super().remove()


def affix_tuning_sites(model: nn.Module, method: AffixTuning) -> list[Site]:
    """Plan affix-tuning of every mixer of ``model``.

    Raises:
        ValueError: No mixer that tokens can be inserted into, one of another kind among them, or a
            position that has no effect there.
    """
    mixers = _mixers(model)
    if method.position == "suffix" and any(n == 1 for _, n in mixers.values()):
        raise ValueError(
            "affix-tuning with position='suffix': a causal mixer reads these tokens after the last "
            "one that counts, so they would have no effect; use 'prefix' or 'infix'"
        )
    first, _ = next(iter(mixers.values()))
    like = weight_like(first.in_proj)
    hidden = method.hidden or first.in_proj.out_features
    found: list[Site] = []
    if method.mlp:
        widths = {mixer.in_proj.out_features for mixer, _ in mixers.values()}
        if len(widths) > 1:
            raise ValueError(
                f"affix-tuning with mlp=True has one network for all mixers, and these have "
                f"in_proj of {sorted(widths)} features; use mlp=False"
            )
        found.append(_network(model, method, like, first.in_proj.out_features, hidden))
    for path, (mixer, directions) in mixers.items():
        # Of a suffix the forward direction would read nothing.
        one = method.shared or directions == 1 or method.position == "suffix"
        found.append(_tokens(model, path, mixer, method, 1 if one else 2, hidden))
    return found


def _mixers(model: nn.Module) -> dict[str, tuple[Any, int]]:
    """Return the mixers by path, each with the number of its directions."""
    found: dict[str, tuple[Any, int]] = {}
    for module, paths in {model: ("",), **module_paths(model)}.items():
        directions = _directions(module)
        if directions:
            found[paths[0]] = module, directions
        elif is_mixer(module):
            raise ValueError(
                f"affix-tuning cannot insert tokens into {paths[0]}, a {type(module).__name__}: it "
                "knows the mixers of Mamba-1 and Mamba-2 that have a fused path, and Vim's; leave "
                "the method out for this model"
            )
    if not found:
        raise ValueError(
            f"affix-tuning finds no mixer of Mamba's in a {type(model).__name__}, so there is "
            "nothing to insert tokens into"
        )
    return found


def _directions(module: Any) -> int:
    """Return how many ways a mixer scans that tokens can be inserted into; 0 for any other."""
    if isinstance(module, BidirectionalMamba):
        return 2
    if vim.recognises(module):
        return {"v2": 2, "none": 1}.get(module.bimamba_type, 0)
    return int(mamba_ssm.inserts(module) or hf.fused_function(module) is not None)


def _network(
    model: nn.Module, method: AffixTuning, like: Tensor, features: int, hidden: int
) -> Site:
    embedding, weight, bias = _NETWORK
    shapes = {embedding: (method.tokens, features), weight: (hidden, features), bias: (hidden,)}

    def install() -> Addition:
        w1, b1 = drawn_linear(like, features, hidden)
        drawn = drawn_embedding(like, method.tokens, features)
        return Addition(model, method, {embedding: drawn, weight: w1, bias: b1})

    return Site("", shapes, install)


def _tokens(
    model: nn.Module, path: str, mixer: Any, method: AffixTuning, sets: int, hidden: int
) -> Site:
    features, like = mixer.in_proj.out_features, weight_like(mixer.in_proj)
    affix = Affix(method, sets, model if method.mlp else None)
    if not method.mlp:
        shape = (sets, method.tokens, features)
        return Site(
            path,
            {_TOKENS: shape},
            _installed(mixer, method, affix, lambda: {_TOKENS: _drawn(like, shape)}),
        )

    def drawn() -> dict[str, Tensor]:
        pairs = [drawn_linear(like, hidden, features) for _ in range(sets)]
        weights, biases = zip(*pairs, strict=True)
        return {_W2: torch.stack(weights), _B2: torch.stack(biases)}

    shapes = {_W2: (sets, features, hidden), _B2: (sets, features)}
    return Site(path, shapes, _installed(mixer, method, affix, drawn))


def _drawn(like: Tensor, shape: tuple[int, int, int]) -> Tensor:
    sets, k, features = shape
    return drawn_embedding(like, sets * k, features).view(shape)


def _installed(
    mixer: nn.Module, method: AffixTuning, affix: Affix, tensors: Callable[[], dict[str, Tensor]]
) -> Callable[[], Addition]:
    return lambda: _MixerAddition(mixer, method, tensors(), affix)
