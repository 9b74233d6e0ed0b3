"""FP8 checkpoints of NVIDIA's ModelOpt and of compressed-tensors: a scale for a weight, or a row.

Their layers hold ``weight`` [N, K] in e4m3, ``weight_scale`` (one number, [1], or [N, 1]) that it
is multiplied by, and often ``input_scale``, to which an engine rounds the inputs. Here inputs are
not rounded, so that and the scales of attention's cache are left out; one scale is read as those
of all 128×128 tiles, which is the same weight bit for bit. compressed-tensors has int8 in the same
way. Experts are read dense, one by one: they
are stored again where a run stores experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from prodial_kernels.quantization.fp8 import TILE
from prodial_kernels.quantization.groups.checkpoints import Tensors
from prodial_kernels.quantization.layer import check_scales

_ROWS = ".weight_scale_rows"
_SCALE, _TILES = ".weight_scale", ".weight_scale_inv"
_LEFT_OUT = (".input_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale")


class WholeScales(Mapping[str, Tensor]):
    """Name -> tensor as a checkpoint in 128×128 tiles would have them."""

    def __init__(self, tensors: Tensors, dtype: torch.dtype) -> None:
        """Look up the names; ``dtype`` is that of experts' weights, which become dense."""
        self._tensors, self._dtype = tensors, dtype
        self._names: dict[str, str] = {}
        for name in tensors:
            if name.endswith(_LEFT_OUT):
                continue
            if not name.endswith(_SCALE):
                self._names[name] = name
            elif not _of_expert(name):
                path = name.removesuffix(_SCALE)
                weight = f"{path}.weight"
                int8 = weight in tensors and tensors.dtype(weight) == "I8"
                self._names[path + (_ROWS if int8 else _TILES)] = name

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            ValueError: Scales of another shape, or that are no finite numbers.
        """
        own = self._names[name]
        layer = own.rpartition(".")[0]
        if name.endswith(_TILES) and own != name:
            return _tiles(self._scale(layer), self._tensors[f"{layer}.weight"])
        if name.endswith(_ROWS) and own != name:
            scale = self._scale(layer).float().reshape(-1)
            return scale.expand(len(self._tensors[f"{layer}.weight"])).contiguous()
        tensor = self._tensors[own]
        if _of_expert(own) and tensor.dtype in (torch.float8_e4m3fn, torch.int8):
            scale = self._scale(layer).float()
            scale = scale if scale.numel() > 1 else scale.reshape(1)
            return tensor.float().mul_(scale).to(self._dtype)
        return tensor

    def part(self, name: str, index: int) -> Tensor:
        """Read ``self[name][index]`` alone, of a tensor without scales."""
        return self._tensors.part(self._names[name], index)

    def _scale(self, layer: str) -> Tensor:
        name = layer + _SCALE
        if name not in self._tensors:
            raise ValueError(f"{layer}: the checkpoint lacks its entry weight_scale")
        scale = self._tensors[name]
        check_scales(name, scale)
        rows = len(self._tensors[f"{layer}.weight"])
        if scale.numel() != 1 and [*scale.shape] != [rows, 1]:
            raise ValueError(
                f"{name} has shape {list(scale.shape)}: what is read is one scale for a weight, or "
                f"one for each row, here [{rows}, 1]"
            )
        return scale

    def dtype(self, name: str) -> str:
        """Dtype as safetensors calls it; nothing is read."""
        return self._tensors.dtype(self._names[name])

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._names)


def _of_expert(name: str) -> bool:
    return ".experts." in name


def _tiles(scale: Tensor, weight: Tensor) -> Tensor:
    """One scale as that of every tile; those of rows as they are."""
    if scale.numel() > 1:
        return scale.float()
    return scale.float().reshape(1, 1).repeat(*(-(-size // TILE) for size in weight.shape))
