"""The tensors of a checkpoint on disk, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_WHOLE = ("model.safetensors", "pytorch_model.bin")
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class TensorFiles(Mapping[str, Tensor]):
    """Name -> tensor on the CPU, from safetensors files or PyTorch's ``.bin`` files.

    A tensor is read when it is asked for and not kept. Safetensors files and ``.bin`` files of
    PyTorch 1.6 or later are mapped into memory, so what is not asked for is never read.
    """

    def __init__(self, path: str | Path) -> None:
        """Look up which file holds what.

        Args:
            path: A directory with ``model.safetensors`` or ``pytorch_model.bin``, whole or in
                shards with their ``.index.json``; or one such file.

        Raises:
            FileNotFoundError: Neither is there, or a shard is missing.
            OSError: A file cannot be read.
        """
        self._open: dict[Path, Any] = {}
        self._files = _files_of(Path(path), self._reader)
        for file in set(self._files.values()):
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing; fetch the checkpoint again")

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor."""
        tensor: Tensor = self._reader(self._files[name])(name)
        return tensor

    def part(self, name: str, index: int) -> Tensor:
        """Read ``self[name][index]`` alone."""
        tensor: Tensor = self._reader(self._files[name]).part(name, index)
        return tensor

    def __iter__(self) -> Iterator[str]:
        """Names, those of one file together."""
        return iter(self._files)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._files)

    def dtype(self, name: str) -> str:
        """Dtype of one tensor as safetensors calls it, such as ``"BF16"``; nothing is read."""
        stored: str = self._reader(self._files[name]).dtype(name)
        return stored

    def _reader(self, file: Path) -> Any:
        """A function from name to tensor, and ``names``."""
        if file not in self._open:
            is_safe = file.suffix == ".safetensors"
            self._open[file] = _SafeFile(file) if is_safe else _TorchFile(file)
        return self._open[file]


class _SafeFile:
    def __init__(self, file: Path) -> None:
        from safetensors import safe_open

        self._handle: Any = safe_open(file, framework="pt")
        self.names: list[str] = list(self._handle.keys())

    def __call__(self, name: str) -> Tensor:
        tensor: Tensor = self._handle.get_tensor(name)
        return tensor

    def part(self, name: str, index: int) -> Tensor:
        tensor: Tensor = self._handle.get_slice(name)[index]
        return tensor

    def dtype(self, name: str) -> str:
        return str(self._handle.get_slice(name).get_dtype())


class _TorchFile:
    def __init__(self, file: Path) -> None:
        # It unpickles nothing but tensors, and maps the file.
        from transformers.modeling_utils import load_state_dict

        self._tensors: Mapping[str, Tensor] = load_state_dict(str(file))
        self.names = list(self._tensors)

    def __call__(self, name: str) -> Tensor:
        return self._tensors[name]

    def part(self, name: str, index: int) -> Tensor:
        return self._tensors[name][index]

    def dtype(self, name: str) -> str:
        dtype = self._tensors[name].dtype
        return _NAMES.get(dtype, str(dtype).removeprefix("torch.").upper())


def _files_of(path: Path, reader: Any) -> dict[str, Path]:
    if path.is_file():
        return dict.fromkeys(reader(path).names, path)
    for name in _WHOLE:
        index = path / f"{name}.index.json"
        if (path / name).is_file():
            return dict.fromkeys(reader(path / name).names, path / name)
        if index.is_file():
            weights: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            # A shard after the other, so that pages are read in the order of the disk.
            ordered = sorted(weights.items(), key=lambda item: item[1])
            return {tensor: path / shard for tensor, shard in ordered}
    raise FileNotFoundError(
        f"{path} holds no weights: expected {' or '.join(_WHOLE)}, or shards of one with its "
        ".index.json"
    )
