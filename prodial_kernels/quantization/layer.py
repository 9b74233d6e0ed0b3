"""``QuantizedLinear``: a frozen linear layer whose weight is stored in another format."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prodial_kernels.functional import checked_linear
from prodial_kernels.kernels.projector.operands import Operands, ProjectionOptions
from prodial_kernels.ops.packed import PackedWeight

CHUNK = 2**22
"""Elements dequantised at a time, which bounds the fp32 temporaries to a few 16 MiB."""


class QuantizedLinear(nn.Module, ABC):
    """``y = x Wᵀ + bias`` with W [out_features, in_features] frozen in a storage format.

    ``dtype`` is what W is dequantised to and what inputs must be in; ``.to(dtype)`` changes it and
    never the stored tensors. ``state_dict()`` holds the entries of the format, see
    :mod:`prodial_kernels.quantization`. The weight gets no gradient; the bias can be trained.
    """

    FORMAT: ClassVar[str]
    bias: nn.Parameter | None
    only_described: bool = False
    """Whether ``weight`` has its shape, dtype and device alone, and no values of its own."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        """Hold what every format has. Made by ``quantize_linear`` and ``from_state_dict``."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    @abstractmethod
    def quantize(cls, weight: Tensor, bias: Tensor | None) -> QuantizedLinear:
        """Quantise a finite weight [out_features, in_features] of 16 or 32 bits."""

    @classmethod
    @abstractmethod
    def from_entries(
        cls, entries: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype | None
    ) -> QuantizedLinear:
        """Build a layer from the format's entries, named as after the layer's prefix.

        Raises:
            KeyError: An entry is missing.
            ValueError: An entry that does not fit the format.
        """

    @abstractmethod
    def rounded(self, weight: Tensor) -> QuantizedLinear:
        """Return a layer that stores ``weight`` [N, K] as this one stores its own, with its bias.

        To the nearest codes; scales stay where they fit the new values, and have the dtype that
        they have here. So a weight that this layer holds comes out in the same codes.

        Raises:
            ValueError: Weights are not made in this variant of the format.
        """

    @abstractmethod
    def entries(self) -> dict[str, Tensor]:
        """Return what :meth:`from_entries` takes back."""

    @abstractmethod
    def write(self, packed: tuple[Tensor, ...], out: Tensor) -> None:
        """Dequantise ``packed``, what :meth:`packed` gives, to a contiguous ``out``.

        In fp32, rounded once: the definition, on any device.
        """

    @abstractmethod
    def launch(self, packed: tuple[Tensor, ...], dtype: torch.dtype, out: Tensor | None) -> Tensor:
        """Do the same bit for bit with a Triton kernel; ``dtype`` has 16 or 32 bits.

        Returns ``out``, or a new tensor for None.
        """

    @abstractmethod
    def gather(self, packed: tuple[Tensor, ...], rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Dequantise the rows [m] int64 of ``packed``: [m, in_features], as :meth:`write` does."""

    @property
    @abstractmethod
    def row_multiple(self) -> int:
        """Rows between two places where the storage can be cut, see :meth:`part`."""

    @abstractmethod
    def cut(self, packed: tuple[Tensor, ...], start: int, stop: int) -> tuple[Tensor, ...]:
        """Views of ``packed`` for rows from ``start``, a multiple of ``row_multiple``."""

    @torch.no_grad()
    def unpack(
        self, packed: tuple[Tensor, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """Dequantise ``packed``: by a kernel where the weight is on a GPU."""
        if takes_kernels(packed[0].device, dtype):
            # Triton launches on the current device, which need not be that of the weight.
            with torch.cuda.device_of(packed[0]):
                return self.launch(packed, dtype, out)
        if out is None:
            shape = (self.out_features, self.in_features)
            out = torch.empty(shape, dtype=dtype, device=packed[0].device)
        self.write(packed, out)
        return out

    @torch.no_grad()
    def unpack_some(
        self, stacked: tuple[Tensor, ...], ids: Tensor, known: list[int], out: Tensor
    ) -> Tensor:
        """Dequantise some of several weights like this one's.

        Args:
            stacked: What :meth:`packed` gives, with a dimension more in front.
            ids: Which, [g] int64, on the device.
            known: The same on the host.
            out: Contiguous [g, out_features, in_features], to write to and return.
        """
        for place, index in enumerate(known):
            self.unpack(tuple(tensor[index] for tensor in stacked), out.dtype, out[place])
        return out

    def packed(self) -> tuple[Tensor, ...]:
        """The tensors that the weight is stored in."""
        return tuple(buffer for buffer in self._buffers.values() if buffer is not None)

    def packed_weight(self) -> PackedWeight:
        """The weight as the operation takes it: aliases of the stored tensors, and how to read."""
        return PackedWeight(self.packed(), self.unpack)

    @torch.no_grad()
    def lookup(self, rows: Tensor) -> Tensor:
        """Return rows of W as an embedding does: [...] int64 -> [..., in_features].

        No other row is dequantised.
        """
        flat, packed = rows.reshape(-1), self.packed()
        out = torch.empty(len(flat), self.in_features, dtype=self.dtype, device=self.device)
        step = max(1, CHUNK // self.in_features)
        for start in range(0, len(flat), step):
            part = slice(start, start + step)
            out[part] = self.gather(packed, flat[part], self.dtype)
        return out.view(*rows.shape, self.in_features)

    def part(self, start: int, stop: int) -> QuantizedLinear:
        """Return a layer without bias with some rows of W; it shares their storage.

        Args:
            start: A multiple of ``row_multiple``.
            stop: Likewise, or ``out_features``.

        Raises:
            ValueError: The storage cannot be cut there.
        """
        inside = 0 <= start < stop <= self.out_features
        ends = stop == self.out_features or stop % self.row_multiple == 0
        if not inside or start % self.row_multiple or not ends:
            raise ValueError(
                f"start and stop must be multiples of {self.row_multiple} within "
                f"{self.out_features} rows, got {start} and {stop}"
            )
        return self.with_storage(self.cut(self.packed(), start, stop), stop - start)

    def with_storage(
        self, packed: tuple[Tensor, ...], out_features: int | None = None
    ) -> QuantizedLinear:
        """Return a layer without bias like this one that holds ``packed``, not copied."""
        layer = copy.copy(self)
        names = [name for name, buffer in self._buffers.items() if buffer is not None]
        layer._buffers = {**self._buffers, **dict(zip(names, packed, strict=True))}
        layer._parameters = {"bias": None}
        layer.out_features = self.out_features if out_features is None else out_features
        return layer

    def stand_in(self) -> Tensor:
        """A tensor with the shape, dtype and device of the dense weight, and one element."""
        one = torch.empty(1, dtype=self.dtype, device=self.device)
        return one.expand(self.out_features, self.in_features)

    @property
    def device(self) -> torch.device:
        """Where the stored weight is."""
        return self.packed()[0].device

    @property
    def packed_bytes(self) -> int:
        """Bytes of the stored weight, scales included, bias not."""
        return sum(buffer.nbytes for buffer in self.packed())

    @property
    def weight(self) -> Tensor:
        """The dequantised weight, made anew at every read: for code that does not call the layer.

        Autograd keeps a weight that is multiplied by this way; calling the layer keeps none.
        """
        if self.only_described:
            one = torch.empty(1, 1, dtype=self.dtype, device=self.device)
            return one.expand(self.out_features, self.in_features)
        return self.dequantize()

    @torch.no_grad()
    def dequantize(self, out: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return W [out_features, in_features] in ``dtype`` (default: the layer's).

        Args:
            out: Contiguous tensor to write to; its dtype counts.
            dtype: Floating-point dtype of a new tensor.

        Raises:
            ValueError: ``out`` has another shape or device, or is not contiguous.
        """
        if out is None:
            return self.unpack(self.packed(), self.dtype if dtype is None else dtype)
        shape = (self.out_features, self.in_features)
        if tuple(out.shape) != shape or out.device != self.device or not out.is_contiguous():
            raise ValueError(
                f"out must be contiguous with shape {list(shape)} on {self.device}, got shape "
                f"{list(out.shape)}, strides {list(out.stride())} on {out.device}"
            )
        return self.unpack(self.packed(), out.dtype, out)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """Return a plain ``nn.Linear`` with the dequantised weight and a copy of the bias."""
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(self.dequantize(), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone(), requires_grad=False)
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]; the argument is named as in ``nn.Linear``."""
        return checked_linear(input, *self.projection())

    def projection(self, *, bias: bool = True) -> tuple[Operands, ProjectionOptions]:
        """What ``x Wᵀ + bias`` computes with; see :func:`prodial_kernels.functional.prepared`."""
        options = ProjectionOptions("plain", packed=self.packed_weight())
        return Operands(self.stand_in(), bias=self.bias if bias else None), options

    def extra_repr(self) -> str:
        """The shape, the dtype computed in, and what a weight costs."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.FORMAT!r}, dtype={self.dtype}, "
            f"bytes_per_weight={self.packed_bytes / (self.in_features * self.out_features):.4g}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Move everything; a cast changes the bias and ``dtype``, never the stored tensors."""
        dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        super()._apply(keeping_dtypes(fn, self.packed()), recurse)
        self.dtype = dtype
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, tensor in self.entries().items():
            destination[prefix + name] = tensor
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Replace the stored tensors by the format's entries under ``prefix``."""
        given = {
            name.removeprefix(prefix): value
            for name, value in state_dict.items()
            if name.startswith(prefix)
        }
        bias = given.pop("bias", None)
        if self.bias is None and bias is not None:
            unexpected_keys.append(prefix + "bias")
        if self.bias is not None and bias is None:
            missing_keys.append(prefix + "bias")
        try:
            loaded = type(self).from_entries(given, None, self.dtype)
        except KeyError as error:
            missing_keys.append(prefix + str(error.args[0]))
            return
        except ValueError as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")
            return
        ours, theirs = ([layer.out_features, layer.in_features] for layer in (self, loaded))
        if ours != theirs or (bias is not None and tuple(bias.shape) != (self.out_features,)):
            error_msgs.append(
                f"{prefix.rstrip('.')}: expected a weight of shape [out_features, in_features] = "
                f"{ours} and a bias to match, got {theirs}"
            )
            return
        known = set(loaded.entries())
        unexpected_keys.extend(prefix + name for name in given if name not in known)
        self._take(loaded)
        if self.bias is not None and bias is not None:
            with torch.no_grad():
                self.bias.copy_(bias)

    def _take(self, other: QuantizedLinear) -> None:
        """Store what ``other``, of the same class and shape, stores."""
        device = self.device
        for name, buffer in other._buffers.items():
            self._buffers[name] = None if buffer is None else buffer.to(device)


def keeping_dtypes(
    fn: Callable[[Tensor], Tensor], stored: Iterable[Tensor]
) -> Callable[[Tensor], Tensor]:
    """Return ``fn`` for ``nn.Module._apply``, which moves ``stored`` and does not cast them."""
    known = {id(tensor) for tensor in stored}

    def keep_format(tensor: Tensor) -> Tensor:
        applied = fn(tensor)
        if id(tensor) not in known or applied.dtype == tensor.dtype:
            return applied
        return tensor.to(applied.device)

    return keep_format


def check_scales(name: str, scales: Tensor) -> None:
    """Raise ValueError unless an entry of a format holds finite numbers, not codes of them.

    Scales as bare exponents are read where their dtype says so (float8_e8m0fnu).
    """
    exponents = scales.dtype == torch.float8_e8m0fnu
    if not scales.is_floating_point() or (scales.itemsize < 2 and not exponents):
        raise ValueError(
            f"{name} must be scales in floating point, got {scales.dtype}: another format than the "
            "one that is read"
        )
    if not scales.float().isfinite().all():
        raise ValueError(f"{name} is not finite; fetch the checkpoint again")


def takes_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels support device and dtype; they do not support fp64."""
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16, torch.float32)
