"""Low-rank terms on weights: LoRA, and LoRA on some of the output rows.

Three places, by how a weight is used:

* A projector that an adapted layer stands for (:class:`~prodial_kernels.linear.ProdialLinear`, with
  no adapter of its own where none was asked for): the terms are stacked to its A and B, and the
  kernels see one low-rank product. B's other rows are zeros there.
* ``x_proj`` and ``dt_proj``, whose weight the fused functions read, are 1 to 3 % of ``in_proj``:
  whoever reads the weight gets W + α B A, formed anew, and gradients flow through it.
* An embedding looks its rows up in A as well; a patch embedding's convolution reads W + α B A.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prodial_kernels.kernels.projector.operands import Operands, ProjectionOptions
from prodial_kernels.linear import ProdialLinear, weight_like
from prodial_kernels.merged_weight import marks_of
from prodial_kernels.methods import Method
from prodial_kernels.models.methods.base import (
    ADDED,
    Addition,
    added,
    switched_off,
    wide_like,
    zeros_beside,
)
from prodial_kernels.models.patch_point import Policy

# Attribute of an adapted layer: the terms on its weight.
_TERMS = "_prodial_terms"


@dataclass(frozen=True)
class Term:
    """One low-rank term of a weight [n, k].

    Attributes:
        tag: Tells its tensors from those of other terms: ``prodial_added_<tag>_a`` [r, k] and
            ``…_b`` [stop - start, r].
        scaling: α.
        dropout: Probability on its input.
        start: The first of the rows that it covers.
        stop: The row behind the last.
        rows: n.
    """

    tag: str
    scaling: float
    dropout: float
    start: int
    stop: int
    rows: int

    @property
    def names(self) -> tuple[str, str]:
        """The names of A and B."""
        return f"{ADDED}{self.tag}_a", f"{ADDED}{self.tag}_b"

    def shapes(self, r: int, columns: int) -> dict[str, tuple[int, ...]]:
        """The shapes of A and B."""
        a, b = self.names
        return {a: (r, columns), b: (self.stop - self.start, r)}

    @property
    def whole(self) -> bool:
        """Whether it covers every row."""
        return self.start == 0 and self.stop == self.rows

    def factors(self, module: nn.Module) -> tuple[Tensor, Tensor] | None:
        """A and B, or None once they are gone."""
        a, b = (added(module, name) for name in self.names)
        return None if a is None or b is None else (a, b)

    def padded(self, b: Tensor) -> Tensor:
        """B with zeros for the rows that it does not cover, [n, r]."""
        return b if self.whole else F.pad(b, (0, 0, self.start, self.rows - self.stop))

    def __call__(self, module: nn.Module, value: Any) -> Any:
        """View of a weight: W + α B A, in the dtype of W; other rows are W's own."""
        factors = self.factors(module)
        if factors is None:
            return value
        a, b = factors
        wide = wide_like(value)
        covered = value[self.start : self.stop].to(wide)
        moved = torch.addmm(covered, b.to(wide), a.to(wide), alpha=self.scaling).to(value.dtype)
        if self.whole:
            return moved
        return torch.cat((value[: self.start], moved, value[self.stop :]))


@dataclass(frozen=True)
class FlatTerm:
    """View of a convolution's weight [n, c, h, w] as the matrix [n, c h w] that multiplies patches.

    Attributes:
        term: The term of that matrix.
    """

    term: Term

    def __call__(self, module: nn.Module, value: Any) -> Any:
        """W + α B A, in the shape of W."""
        return self.term(module, value.flatten(1)).view_as(value)


class PatchTerm(Addition):
    """A term in the weight of a patch embedding's convolution."""

    def __init__(self, convolution: nn.Conv2d, method: Method, term: Term, r: int) -> None:
        """Add the term to ``convolution.weight``."""
        weight: Any = convolution._parameters["weight"]
        tensors = new_factors(term, r, weight, weight[0].numel())
        super().__init__(convolution, method, tensors, views={"weight": FlatTerm(term)})


def new_factors(term: Term, r: int, like: Tensor, columns: int) -> dict[str, Tensor]:
    """A as PEFT draws it and B = 0, on the device of ``like``."""
    a_name, b_name = term.names
    a = zeros_beside(like, r, columns)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return {a_name: a, b_name: zeros_beside(like, term.stop - term.start, r)}


class ReadTerm(Addition):
    """A term in the weight that others read of a dense layer."""

    def __init__(self, layer: nn.Linear, method: Method, term: Term, r: int) -> None:
        """Add the term to ``layer.weight``."""
        tensors = new_factors(term, r, layer._parameters["weight"], layer.in_features)  # type: ignore[arg-type]
        super().__init__(layer, method, tensors, views={"weight": term})


class StackedTerm(Addition):
    """A term beside the adapter of an adapted layer."""

    def __init__(self, layer: ProdialLinear, method: Method, term: Term, r: int) -> None:
        """Stack the term to the layer's own low-rank part."""
        tensors = new_factors(term, r, weight_like(layer.base_layer), layer.in_features)
        first = _TERMS not in vars(layer)
        policies: Mapping[str, Policy] = _POLICIES if first else {}
        super().__init__(layer, method, tensors, policies=policies)
        vars(layer)[_TERMS] = (*vars(layer).get(_TERMS, ()), term)
        self.term = term

    def remove(self) -> None:
        """Take the term out."""
        super().remove()
        left = tuple(t for t in vars(self.module).get(_TERMS, ()) if t is not self.term)
        if left:
            vars(self.module)[_TERMS] = left
        else:
            vars(self.module).pop(_TERMS, None)


def terms_of(layer: nn.Module) -> tuple[Term, ...]:
    """Return the terms beside the adapter of an adapted layer."""
    terms: tuple[Term, ...] = vars(layer).get(_TERMS, ())
    return terms


def total_rank(layer: ProdialLinear) -> int:
    """Return the rank of the low-rank product that calls of ``layer`` compute."""
    ranks = (added(layer, term.names[0]) for term in terms_of(layer))
    return layer.r + sum(a.shape[0] for a in ranks if a is not None)


def bare_layer(linear: Any) -> ProdialLinear:
    """Return an adapted layer without an adapter of its own, in the layer's train or eval mode."""
    wide = torch.promote_types(torch.float32, weight_like(linear).dtype)
    layer = ProdialLinear(linear, r=1, train_scale=False, train_diagonal=False, adapter_dtype=wide)
    layer.prodial_a = layer.prodial_b = None
    layer.r = 0
    return layer.train(linear.training)


def stacked(
    terms: tuple[Term, ...], layer: Any, operands: Operands, options: ProjectionOptions
) -> tuple[Operands, ProjectionOptions]:
    """Return operands whose low-rank part is the layer's own and ``terms``."""
    found = [(term, term.factors(layer)) for term in terms]
    parts = [(term, factors) for term, factors in found if factors is not None]
    own_a, own_b = operands.lora_a, operands.lora_b
    if not parts:
        return operands, options
    if own_a is None and len(parts) == 1:
        term, (a, b) = parts[0]
        options = options._replace(lora_scaling=term.scaling, lora_dropout=term.dropout)
        return operands._replace(lora_a=a, lora_b=term.padded(b)), options
    over = [a for _, (a, _) in parts]
    back = [term.padded(b) * term.scaling for term, (_, b) in parts]
    dropout = parts[0][0].dropout
    if own_a is not None and own_b is not None:
        over, back = [own_a, *over], [own_b * options.lora_scaling, *back]
        dropout = options.lora_dropout
    return (
        operands._replace(lora_a=torch.cat(over), lora_b=torch.cat(back, dim=1)),
        options._replace(lora_scaling=1.0, lora_dropout=dropout),
    )


def projection_with_terms(layer: Any, upstream: Any, **options: Any) -> Any:
    """``ProdialLinear.projection`` of a layer with terms."""
    return stacked(terms_of(layer), layer, *upstream(layer, **options))


def weight_with_terms(layer: Any, upstream: Any) -> Tensor:
    """``ProdialLinear.adapted_weight`` of a layer with terms."""
    weight: Tensor = upstream(layer)
    for term in terms_of(layer):
        weight = term(layer, weight)
    return weight


def marks_with_terms(layer: Any, upstream: Any) -> Any:
    """``ProdialLinear._marks`` of a layer with terms."""
    tensors = [t for term in terms_of(layer) for t in term.factors(layer) or ()]
    return (*upstream(layer), *marks_of(tensors))


_POLICIES: Mapping[str, Policy] = {
    "projection": projection_with_terms,
    "adapted_weight": weight_with_terms,
    "_marks": marks_with_terms,
}


class EmbeddedTerm(Addition):
    """A low-rank term of an embedding [V, d]: A [V, r], 0 at first, and B [d, r].

    A head that is tied to the embedding keeps the pretrained weight.
    """

    def __init__(self, embedding: nn.Module, method: Method, scaling: float, r: int) -> None:
        """Look rows up in the term as well."""
        owner: Any = embedding
        like = owner.weight
        b = zeros_beside(like, owner.embedding_dim, r)
        nn.init.normal_(b)
        a_name, b_name = EMBEDDED
        tensors = {a_name: zeros_beside(like, owner.num_embeddings, r), b_name: b}
        super().__init__(embedding, method, tensors, policies={"forward": embed_with_term})
        vars(embedding)[_SCALING] = scaling

    def fold(self) -> None:
        """Add the term to the embedding's own weight, which is tied to no other any more."""
        module: Any = self.module
        a, b = (added(module, name) for name in EMBEDDED)
        if a is None or b is None:
            return
        own = dict(module._parameters)
        weight = own["weight"]
        wide = wide_like(weight)
        scaling = vars(module)[_SCALING]
        moved = torch.addmm(weight.detach().to(wide), a.detach(), b.detach().T, alpha=scaling)
        own["weight"] = nn.Parameter(moved.to(weight.dtype), requires_grad=weight.requires_grad)
        for name in EMBEDDED:
            own.pop(name, None)
        vars(module)["_parameters"] = own

    def remove(self) -> None:
        """Take the term out."""
        super().remove()
        vars(self.module).pop(_SCALING, None)


EMBEDDED = (f"{ADDED}lora_a", f"{ADDED}lora_b")
"""Names of an embedding's A and B."""
_SCALING = "_prodial_embedded_scaling"


def embed_with_term(module: Any, upstream: Any, input: Tensor) -> Tensor:
    """``forward`` of an embedding with a term: [...] -> [..., d]."""
    rows: Tensor = upstream(module, input)
    a, b = (added(module, name) for name in EMBEDDED)
    if a is None or b is None or switched_off(module):
        return rows
    term = F.embedding(input, a) @ b.T * vars(module)[_SCALING]
    return (rows + term).to(rows.dtype)
