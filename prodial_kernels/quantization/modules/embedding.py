"""``QuantizedEmbedding``: an embedding with a stored table, of which only used rows are dense.

Where the model's head is tied to it, both are one stored weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from prodial_kernels.quantization.layer import QuantizedLinear


class QuantizedEmbedding(nn.Module):
    """``y = W[ids]`` with W [num_embeddings, embedding_dim] frozen in a storage format.

    ids [...] int64 -> [..., embedding_dim] in ``table.dtype``. ``table`` is no child of this
    module, so that nothing takes it for a layer that is called.
    """

    def __init__(self, table: QuantizedLinear, *, tied: bool, padding_idx: int | None) -> None:
        """Hold the table; ``tied`` if a head of the model is that very layer and moves it."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.out_features, table.in_features
        self.padding_idx = padding_idx
        self.tied = tied
        # Not an attribute that nn.Module registers.
        vars(self)["table"] = table

    @property
    def weight(self) -> Tensor:
        """The dequantised table, made anew at every read: for code that does not call this."""
        table: QuantizedLinear = vars(self)["table"]
        return table.dequantize()

    def forward(self, input: Tensor) -> Tensor:
        """[...] -> [..., embedding_dim]; the argument is named as in ``nn.Embedding``."""
        table: QuantizedLinear = vars(self)["table"]
        return table.lookup(input)

    def to_plain(self, weight: nn.Parameter | None = None) -> nn.Embedding:
        """Return a plain embedding with ``weight``, or with the dequantised table."""
        plain = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta"
        )
        dense = nn.Parameter(self.weight, requires_grad=False) if weight is None else weight
        plain.weight = dense
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """The shape, and what it is stored in."""
        table: QuantizedLinear = vars(self)["table"]
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, format={table.FORMAT!r}, "
            f"dtype={table.dtype}, tied={self.tied}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedEmbedding:
        super()._apply(fn, recurse)
        if not self.tied:
            vars(self)["table"]._apply(fn, recurse)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        vars(self)["table"]._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        vars(self)["table"]._load_from_state_dict(state_dict, prefix, *rest)
