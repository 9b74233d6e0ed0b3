"""Prompt-tuning: tokens beside the embedded sequence, in the model that embeds it.

* ``VisionMamba`` gets them around its tokens, and drops them behind its last norm.
* transformers' models get ``inputs_embeds`` with them in front, and give back hidden states without
  them; so their heads see the length that the caller sees.
* mamba_ssm's get an embedding that puts them in front.

A text that goes on after another, by a cache, has them in its state already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prodial_kernels.linear import weight_like
from prodial_kernels.methods import PromptTuning
from prodial_kernels.models.layers.packed_rows import SEQ_IDX
from prodial_kernels.models.methods.base import Addition, Site, added, switched_off
from prodial_kernels.models.methods.learned_tokens import (
    drawn_embedding,
    drawn_linear,
    encoded,
    names,
)
from prodial_kernels.models.mixers.arguments import cache_among, mask_among, named_arguments
from prodial_kernels.models.mixers.inserted.tokens import (
    Layout,
    PaddedLayout,
    behind_padding,
    lengthened_mask,
)
from prodial_kernels.models.mixers.structure import forward_of, names_in
from prodial_kernels.models.patch_point import Policy, View
from prodial_kernels.models.placements import is_mixer
from prodial_kernels.models.vision_mamba import VisionMamba
from prodial_kernels.module_tree import module_paths

_KIND = "prompt"
_TOKENS, _W2, _B2 = names(_KIND, "tokens", "w2", "b2")
_NETWORK = names(_KIND, "embedding", "w1", "b1")
_BOTH = "_prodial_prompt_both"

# transformers' models of state-space layers alone. In others the prompt would move the positions
# and the caches of attention too.
_OF_TRANSFORMERS = ("mamba", "falcon_mamba", "mamba2")


class _Place(NamedTuple):
    """Where a prompt goes: the module at whose input, what runs it, and its tokens' layout."""

    path: str
    module: Any
    like: Tensor
    width: int
    policies: dict[str, Policy]
    both: bool


class _PromptAddition(Addition):
    """An :class:`Addition` that remembers whether a prompt stands on both sides."""

    def __init__(self, place: _Place, method: PromptTuning, tensors: dict[str, Tensor]) -> None:
        super().__init__(place.module, method, tensors, policies=place.policies)
        vars(place.module)[_BOTH] = place.both

    def remove(self) -> None:
        """Restore the model."""
        super().remove()
        vars(self.module).pop(_BOTH, None)


def prompt_tuning_sites(model: nn.Module, method: PromptTuning) -> list[Site]:
    """Plan a prompt at the input of ``model``.

    Raises:
        ValueError: No model that a prompt can be put into, or a place where it has no effect.
    """
    place = _place(model)
    if method.position == "both" and not place.both:
        raise ValueError(
            "prompt-tuning with position='both': this model reads from left to right, so tokens "
            "behind the sequence would have no effect; use 'prefix'"
        )
    place = place._replace(both=place.both and method.position != "prefix")
    k, width, like = method.tokens, place.width, place.like
    if not method.mlp:
        shapes: dict[str, tuple[int, ...]] = {_TOKENS: (k, width)}

        def drawn() -> dict[str, Tensor]:
            return {_TOKENS: drawn_embedding(like, k, width)}
    else:
        hidden = method.hidden or width
        embedding, w1, b1 = _NETWORK
        shapes = {embedding: (k, width), w1: (hidden, width), b1: (hidden,)}
        shapes |= {_W2: (width, hidden), _B2: (width,)}

        def drawn() -> dict[str, Tensor]:
            first, second = drawn_linear(like, width, hidden), drawn_linear(like, hidden, width)
            tensors = (drawn_embedding(like, k, width), *first, *second)
            return dict(zip(shapes, tensors, strict=True))

    return [Site(place.path, shapes, lambda: _PromptAddition(place, method, drawn()))]


def _place(model: nn.Module) -> _Place:
    for module, paths in {model: ("",), **module_paths(model)}.items():
        found = _place_in(module, paths[0])
        if found is not None:
            return found
    config: Any = getattr(model, "config", None)
    raise ValueError(
        f"prompt-tuning knows no place in a {type(model).__name__}"
        + (f" (model_type {config.model_type!r})" if hasattr(config, "model_type") else "")
        + f"; it takes VisionMamba, mamba_ssm's MixerModel, and {', '.join(_OF_TRANSFORMERS)} of "
        "transformers. With attention in it, a model would count positions from the prompt on: use "
        "affix-tuning, whose tokens only mixers see"
    )


def _place_in(module: Any, path: str) -> _Place | None:
    if isinstance(module, VisionMamba):
        weight = module.cls_token
        return _Place(path, module, weight, weight.shape[-1], {"encode": _encode}, True)
    embedding = getattr(module, "embedding", None)
    if isinstance(embedding, nn.Embedding) and _mixes_only(module):
        policies: dict[str, Policy] = {"forward": _mixer_model}
        return _Place(path, module, embedding.weight, embedding.embedding_dim, policies, False)
    config: Any = getattr(module, "config", None)
    embedding = getattr(module, "embeddings", None)
    of_transformers = type(module).__module__.startswith("transformers.")
    known = getattr(config, "model_type", None) in _OF_TRANSFORMERS
    if of_transformers and known and embedding is not None and hasattr(module, "layers"):
        like = weight_like(embedding)
        return _Place(path, module, like, config.hidden_size, {"forward": _transformers}, False)
    return None


def _mixes_only(module: Any) -> bool:
    """Whether a module embeds tokens and runs layers, each with a mixer of Mamba's, as mamba_ssm's.

    With attention in some, positions in its cache would count from the prompt on.
    """
    layers = getattr(module, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return False
    reads = {"embedding", "layers"} <= names_in(forward_of(module)[1])
    return reads and all(any(map(is_mixer, layer.modules())) for layer in layers)


def _prompt(model: Any) -> tuple[Tensor, int]:
    """Return the tokens, [k, width], and how many stand before the sequence."""
    own, weight = added(model, _TOKENS), added(model, _W2)
    if weight is not None:
        tokens = F.linear(encoded(model, _KIND), weight, added(model, _B2))
    elif own is not None:
        tokens = own
    else:
        raise RuntimeError("the tokens of prompt-tuning are gone from the model")
    k = tokens.shape[0]
    return tokens, (k + 1) // 2 if vars(model)[_BOTH] else k


def _around(model: Any, x: Tensor) -> tuple[Tensor, Layout]:
    """X [b, l, width] with the prompt, and where the sequence lies in it."""
    tokens, before = _prompt(model)
    tokens = tokens.to(x.dtype).expand(x.shape[0], -1, -1)
    length = x.shape[1]
    longer = torch.cat([tokens[:, :before], x, tokens[:, before:]], dim=1)
    return longer, Layout(longer.shape[1], ((before, length),), ())


def _encode(model: Any, upstream: Callable[..., Tensor], tokens: Tensor) -> Tensor:
    """``VisionMamba.encode``: [b, l, width] -> [b, l, width]."""
    if switched_off(model):
        return upstream(model, tokens)
    longer, layout = _around(model, tokens)
    return layout.shortened(upstream(model, longer))


def _mixer_model(model: Any, upstream: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``MixerModel.forward``."""
    given = named_arguments(upstream, args, kwargs)
    cache = cache_among(given)
    if switched_off(model) or (cache is not None and given[cache].seqlen_offset > 0):
        return upstream(model, *args, **kwargs)
    _refuse_packed_rows(given)
    used: list[Layout] = []

    def embedding(ids: Tensor) -> Tensor:
        longer, layout = _around(model, model.embedding(ids))
        used.append(layout)
        return longer

    output = upstream(View(model, embedding=embedding), *args, **kwargs)
    return used[0].shortened(output)


def _transformers(model: Any, upstream: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``MambaModel.forward`` and its like."""
    given = named_arguments(upstream, args, kwargs)
    cache = cache_among(given)
    if switched_off(model) or (cache is not None and given[cache].has_previous_state()):
        return upstream(model, *args, **kwargs)
    _refuse_packed_rows(given)
    ids, embedded = given.pop("input_ids", None), given.pop("inputs_embeds", None)
    if embedded is None:
        embedded = model.get_input_embeddings()(ids)
    layout: Layout | PaddedLayout
    longer, layout = _around(model, embedded)
    mask = mask_among(given)
    if mask is not None and given[mask] is not None:
        where = behind_padding(layout, given[mask])
        if isinstance(where, PaddedLayout):
            longer = where.placed(where.lengthened(embedded).mT, _prompt(model)[0].mT).mT
            layout = where
        given[mask] = lengthened_mask(layout, given[mask])
    output = upstream(model, inputs_embeds=longer, **given)
    if isinstance(output, tuple):
        return (layout.shortened(output[0]), *output[1:])
    output.last_hidden_state = layout.shortened(output.last_hidden_state)
    if output.hidden_states is not None:
        output.hidden_states = tuple(map(layout.shortened, output.hidden_states))
    return output


def _refuse_packed_rows(given: Mapping[str, Any]) -> None:
    """Raise ValueError for rows of several texts, of which only the first would get the prompt."""
    for name, value in given.items():
        if value is not None and (name == SEQ_IDX or name.startswith("cu_seq")):
            raise ValueError(
                f"{name} says where texts begin in a row, and prompt-tuning puts its tokens before "
                "one text a row; give each text a row of its own"
            )
