"""Checkpoints of GPTQ, AWQ and compressed-tensors (pack-quantized), read layer by layer.

None of the libraries is needed. Experts that a checkpoint holds one by one are read dense, and are
stored again where a run stores experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from prodial_kernels.quantization.groups.layer import ENTRIES, GroupedLinear
from prodial_kernels.quantization.groups.layouts import (
    from_awq,
    from_compressed_tensors,
    from_gptq,
)

GROUPED = ("gptq", "awq", "compressed-tensors")
"""Methods of a ``quantization_config`` whose layers are read here."""
_CODES = (".qweight", ".weight_packed")
_OF_LAYER = {
    ".qweight": ("qweight", "qzeros", "scales", "g_idx"),
    ".weight_packed": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point",
                       "weight_g_idx", "input_scale", "output_scale"),
}  # fmt: skip
# What is there beside codes alone.
_BESIDE = {"qzeros": "qweight", "g_idx": "qweight", "weight_shape": "weight_packed"}


class Tensors(Protocol):
    """What is read from: a :class:`~prodial_kernels.quantization.TensorFiles`."""

    def __getitem__(self, name: str, /) -> Tensor: ...
    def __iter__(self) -> Iterator[str]: ...
    def __len__(self) -> int: ...
    def __contains__(self, name: object, /) -> bool: ...
    def part(self, name: str, index: int) -> Tensor: ...  # noqa: D102
    def dtype(self, name: str) -> str: ...  # noqa: D102


class GroupedLayers(Mapping[str, Tensor]):
    """Name -> tensor as if the checkpoint's layers were stored by this package.

    A layer's codes are ``weight``, with its scales and so on beside, as ``GroupedLinear`` has them;
    everything else is what ``tensors`` holds.
    """

    def __init__(self, tensors: Tensors, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        """Look up the names.

        Args:
            tensors: The checkpoint's.
            config: Its ``quantization_config``, checked by ``check_stored_config``.
            dtype: Of experts' weights, which become dense.

        Raises:
            ValueError: A layer without its codes.
        """
        self._tensors, self._config, self._dtype = tensors, config, dtype
        self._layers: dict[str, str] = {}
        for name in tensors:
            for suffix in _CODES:
                if name.endswith(suffix):
                    self._layers[name.removesuffix(suffix)] = suffix
        hidden = {
            f"{path}.{entry}"
            for path, suffix in self._layers.items()
            for entry in _OF_LAYER[suffix]
        }
        for name in tensors:
            path, _, leaf = name.rpartition(".")
            if leaf in _BESIDE and path not in self._layers:
                raise ValueError(f"{path}: the checkpoint lacks its entry {_BESIDE[leaf]}")
        self._last: tuple[str, dict[str, Tensor]] = ("", {})
        # From a name that is shown to the layer; None for what is handed on.
        self._names: dict[str, str | None] = {}
        for name in tensors:
            path, _, leaf = name.rpartition(".")
            if name not in hidden:
                self._names[name] = None
            elif f".{leaf}" in _CODES:
                entries = ("weight",) if _of_expert(path) else ENTRIES
                self._names.update({f"{path}.{entry}": path for entry in entries})

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor; of a layer, all of it at once.

        Raises:
            ValueError: A layer that does not fit its layout.
        """
        path = self._names[name]
        if path is None:
            return self._tensors[name]
        if self._last[0] != path:
            layer = self.layer(path)
            entries = (
                {"weight": layer.dequantize(dtype=self._dtype)}
                if _of_expert(path)
                else layer.entries()
            )
            self._last = (path, entries)
        # Whether a layer has zero points or an order of its own, only its tensors tell.
        return self._last[1].get(name.removeprefix(f"{path}."), torch.empty(0))

    def layer(self, path: str) -> GroupedLinear:
        """Read the layer at ``path`` of the checkpoint, without a bias; errors as above."""
        suffix = self._layers[path]
        entries = {
            entry: self._tensors[f"{path}.{entry}"]
            for entry in _OF_LAYER[suffix]
            if f"{path}.{entry}" in self._tensors
        }
        try:
            if suffix == ".weight_packed":
                return from_compressed_tensors(entries, self._bits_of(entries))
            if self._config.get("quant_method") == "awq":
                return from_awq(entries)
            version = 2 if _format(self._config) == "gptq_v2" else 1
            return from_gptq(entries, self._bits_of(entries), version=version)
        except KeyError as error:
            raise ValueError(f"{path}: the checkpoint lacks its entry {error.args[0]}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _bits_of(self, entries: Mapping[str, Tensor]) -> int:
        """Bits of a layer's codes: by its tensors' sizes where layers may differ."""
        if "weight_packed" in entries:
            groups = (self._config.get("config_groups") or {}).values()
            bits = {int(group["weights"]["num_bits"]) for group in groups if group.get("weights")}
            words, k = entries["weight_packed"].shape[-1], int(entries["weight_shape"][-1])
            fitting = {each for each in bits if -(-k * each // 32) == words}
            return min(fitting or bits)
        order = entries.get("g_idx")
        if order is not None and order.numel():
            return max(1, entries["qweight"].shape[0] * 32 // order.numel())
        return int(self._config["bits"])

    def part(self, name: str, index: int) -> Tensor:
        """Read ``self[name][index]`` alone."""
        return self[name][index] if self._names[name] else self._tensors.part(name, index)

    def dtype(self, name: str) -> str:
        """Dtype as safetensors calls it."""
        path = self._names[name]
        if path is None:
            return self._tensors.dtype(name)
        return "U8" if name.endswith(".weight") and not _of_expert(path) else "F32"

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._names)


def _format(config: Mapping[str, Any]) -> str:
    return str(config.get("checkpoint_format") or config.get("format") or "gptq")


def _of_expert(path: str) -> bool:
    return ".experts." in path
