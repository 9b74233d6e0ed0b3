"""``QuantizedExperts``: a mixture's experts, each weight stored by itself and dense when used."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prodial_kernels.ops.autocast import autocast_dtype
from prodial_kernels.quantization.layer import QuantizedLinear, keeping_dtypes
from prodial_kernels.quantization.modules.routing import (
    Routes,
    combine,
    dispatch,
    routed_linear,
)


class QuantizedStack(nn.Module):
    """Frozen weights W [count, out_features, in_features], each stored by itself in one format.

    A weight is put in with :meth:`put`, when its dense form can already be gone. ``dtype`` is what
    it is dequantised to.
    """

    def __init__(self, count: int, like: QuantizedLinear) -> None:
        """Make room for ``count`` weights stored as that of ``like`` is."""
        super().__init__()
        self.count = count
        self.out_features, self.in_features = like.out_features, like.in_features
        self._names = [name for name, buffer in like._buffers.items() if buffer is not None]
        self._missing = set(range(count))
        for name, buffer in zip(self._names, like.packed(), strict=True):
            self._make_room(name, buffer)
        blank = copy.copy(like)
        blank._buffers = dict.fromkeys(like._buffers)
        blank._parameters = {"bias": None}
        # What a format computes with besides its tensors; not a child.
        vars(self)["_like"] = blank

    def put(self, index: int, layer: QuantizedLinear) -> None:
        """Store the weight of ``layer`` as number ``index``.

        Raises:
            ValueError: It is stored in another way than the first.
        """
        for name, buffer in layer._buffers.items():
            room = self._room(name) if name in self._names else None
            if buffer is None and room is None:
                continue
            if buffer is None or room is None or room[index].shape != buffer.shape:
                raise ValueError(
                    f"expert {index} is stored in another way than the others: {layer.extra_repr()}"
                )
            room[index].copy_(buffer)
        self._missing.discard(index)

    @property
    def missing(self) -> list[int]:
        """Numbers of the weights that were not put in yet."""
        return sorted(self._missing)

    @property
    def format(self) -> str:
        """The storage format."""
        like: QuantizedLinear = vars(self)["_like"]
        return like.FORMAT

    @property
    def dtype(self) -> torch.dtype:
        """What a weight is dequantised to."""
        like: QuantizedLinear = vars(self)["_like"]
        return like.dtype

    @property
    def packed_bytes(self) -> int:
        """Bytes of the stored weights, scales included."""
        return sum(self._room(name).nbytes for name in self._names)

    def _make_room(self, name: str, like: Tensor) -> None:
        self.register_buffer(name, like.new_empty((self.count, *like.shape)))

    def _room(self, name: str) -> Tensor:
        """The tensors of one kind of all weights."""
        return self.get_buffer(name)

    def prefetch(self, known: list[int]) -> None:
        """Begin to bring some weights to the device, where they are not there."""

    def __getitem__(self, index: int) -> QuantizedLinear:
        """One weight as a layer, which shares its storage."""
        if not 0 <= index < self.count:
            raise IndexError(f"index must be in 0..{self.count - 1}, got {index}")
        layer = copy.copy(vars(self)["_like"])
        own = {name: self._room(name)[index] for name in self._names}
        layer._buffers = {**layer._buffers, **own}
        result: QuantizedLinear = layer
        return result

    def __len__(self) -> int:
        """Number of weights."""
        return self.count

    def __iter__(self) -> Any:
        """Each weight as a layer."""
        return (self[index] for index in range(self.count))

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """Return all weights [count, out_features, in_features]: for saving, not for products."""
        first = self[0]
        shape = (self.count, self.out_features, self.in_features)
        out = torch.empty(shape, dtype=self.dtype, device=first.device)
        for index in range(self.count):
            self[index].dequantize(out[index])
        return out

    @torch.no_grad()
    def unpack_some(self, ids: Tensor, known: list[int], out: Tensor) -> Tensor:
        """Dequantise the weights ``ids`` [g], on the host ``known``, to ``out`` [g, N, K]."""
        like: QuantizedLinear = vars(self)["_like"]
        packed = tuple(self._room(name) for name in self._names)
        return like.unpack_some(packed, ids, known, out)

    def extra_repr(self) -> str:
        """Shape and format."""
        return (
            f"{self.count} × [{self.out_features}, {self.in_features}], format={self.format!r}, "
            f"dtype={self.dtype}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedStack:
        like: QuantizedLinear = vars(self)["_like"]
        device = next(self.buffers(recurse=False)).device
        dtype = fn(torch.empty(0, dtype=like.dtype, device=device)).dtype
        super()._apply(keeping_dtypes(fn, self.buffers(recurse=False)), recurse)
        # One of its own: copies of a module share it otherwise.
        like = copy.copy(like)
        like.dtype = dtype
        vars(self)["_like"] = like
        return self


class QuantizedExperts(nn.Module):
    """The experts of transformers' mixtures (3-D weights), stored one by one.

    Takes and returns what the module does that it stands for: hidden states [M, d], the chosen
    experts [M, k] int64 and their weights [M, k] -> [M, d]. Only experts with tokens are
    dequantised, a few at a time (:mod:`~prodial_kernels.quantization.modules.routing`).
    """

    def __init__(self, experts: nn.Module, stacks: Mapping[str, QuantizedStack]) -> None:
        """Stand for ``experts``, whose parameters are replaced by ``stacks``, by their names."""
        super().__init__()
        own: Any = experts
        self.num_experts: int = own.num_experts
        self.gated = "gate_up_proj" in stacks
        self.act_fn: Any = own.act_fn
        for name, stack in stacks.items():
            self.add_module(name, stack)
        plain = copy.copy(experts)
        plain._parameters = dict.fromkeys(experts._parameters)
        vars(self)["_plain"] = plain
        self.train(experts.training)

    @property
    def stacks(self) -> dict[str, QuantizedStack]:
        """Its weights by the names of the parameters that they stand for."""
        return {n: m for n, m in self._modules.items() if isinstance(m, QuantizedStack)}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[M, d], [M, k], [M, k] -> [M, d]."""
        stacks = self.stacks
        cast_to = autocast_dtype(hidden_states) or hidden_states.dtype
        routes = Routes(top_k_index, self.num_experts)
        rows = dispatch(hidden_states.to(cast_to), routes)
        if self.gated:
            gate, up = routed_linear(rows, stacks["gate_up_proj"], routes).chunk(2, dim=-1)
            rows = self.act_fn(gate) * up
        else:
            rows = self.act_fn(routed_linear(rows, stacks["up_proj"], routes))
        rows = routed_linear(rows, stacks["down_proj"], routes)
        return combine(rows, top_k_weights, routes).to(hidden_states.dtype)

    def to_plain(self) -> nn.Module:
        """Return the module that this stands for, with dequantised weights."""
        plain = copy.copy(vars(self)["_plain"])
        plain._parameters = {
            **plain._parameters,
            **{
                name: nn.Parameter(stack.dequantize(), requires_grad=False)
                for name, stack in self.stacks.items()
            },
        }
        plain.train(self.training)
        result: nn.Module = plain
        return result
