"""A checkpoint of quantised layers, written with merged ones in the places of its own.

What was not trained is copied as it is, tensor by tensor and file by file, and so is everything
beside the weights, ``quantization_config`` included: what read the checkpoint reads this one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prodial_kernels.files.written import MARKER
from prodial_kernels.models.loading.as_transformers import rescaled
from prodial_kernels.models.loading.mamba_ssm_format import renamed
from prodial_kernels.models.loading.quantized import renaming
from prodial_kernels.quantization import QuantizedLinear, TensorFiles
from prodial_kernels.quantization.groups.layer import GroupedLinear
from prodial_kernels.quantization.groups.layouts import to_awq, to_compressed_tensors, to_gptq
from prodial_kernels.quantization.loading import Piece
from prodial_kernels.quantization.names import listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Beside the files that are written; an adapter in the folder is no part of the model.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_SCALE, _TILES = "weight_scale", "weight_scale_inv"


def write_stored_again(
    model: PreTrainedModel, changed: Mapping[str, QuantizedLinear], directory: Path, output: Path
) -> None:
    """Write the checkpoint in ``directory`` with the weights of ``model`` to ``output``.

    Args:
        model: The checkpoint's model, trained and merged, by ``merge_quantized(…, "stored")``.
        changed: Those of its stored layers that are not as the checkpoint holds them, by path.
        directory: The checkpoint, in safetensors.
        output: An empty directory.

    Raises:
        ValueError: The checkpoint has no place for a tensor of the model, or stores a layer in a
            way that is not made.
        OSError: The disk is full, or a file cannot be read.
    """
    _Writer(model, changed, directory).write(output)


class _Writer:
    def __init__(
        self, model: PreTrainedModel, changed: Mapping[str, QuantizedLinear], directory: Path
    ) -> None:
        content = json.loads((directory / "config.json").read_bytes())
        self._config: dict[str, Any] = content.get("quantization_config") or {}
        if rescaled(model.config):
            raise ValueError(
                "config.json has rescale_prenorm_residual=True, by which transformers would divide "
                "out_proj of what is written again; set it to false if the weights are used as "
                "they are"
            )
        self._directory, self._tensors = directory, TensorFiles(directory)
        rename: Callable[[str], str | Piece] = renaming(model)
        self._rename = lambda name: rename(renamed(name))
        self._state: dict[str, Tensor] = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        self._changed = changed
        # A name of the checkpoint -> the path there of the changed layer that it is an entry of.
        self._path_of: dict[str, str] = {}
        self._layer_at: dict[str, QuantizedLinear] = {}
        self._find_layers()
        self._made: dict[str, dict[str, Tensor]] = {}
        self._written: set[int] = set()

    def _find_layers(self) -> None:
        entries: dict[str, list[str]] = {}
        for name in self._tensors:
            entries.setdefault(_path_and_entry(name)[0], []).append(name)
        left = dict(self._changed)
        for path, names in entries.items():
            found = self._rename(f"{path}.weight") if len(names) > 1 else None
            layer = left.pop(found.removesuffix(".weight"), None) if type(found) is str else None
            if layer is not None:
                self._layer_at[path] = layer
                self._path_of |= {n: path for n in names if not n.endswith(".bias")}
        if left:
            raise ValueError(f"the checkpoint has no place for {listed(left)}")

    def write(self, output: Path) -> None:
        from safetensors import safe_open
        from safetensors.torch import save_file

        files = sorted(self._directory.glob("*.safetensors"))
        if not files:
            raise ValueError(
                f"{self._directory} holds no safetensors files, which are what is written again; "
                "merge to a dense model instead"
            )
        for file in files:
            with safe_open(file, framework="pt") as opened:
                names, metadata = list(opened.keys()), opened.metadata()
            tensors = {name: self._one(name) for name in names}
            save_file(tensors, output / file.name, metadata=metadata or {"format": "pt"})
            del tensors
        _check_all_written(self._state, self._written)
        for other in sorted(self._directory.iterdir()):
            if other.is_file() and other.suffix not in _WEIGHTS and other.name != MARKER:
                shutil.copyfile(other, output / other.name)

    def _entries(
        self, path: str, layer: QuantizedLinear, there: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        method = str(self._config.get("quant_method"))
        made: Mapping[str, Tensor]
        if isinstance(layer, GroupedLinear) and "qweight" in there:
            version = 2 if "gptq_v2" in (
                self._config.get("checkpoint_format"), self._config.get("format")
            ) else 1  # fmt: skip
            made = to_awq(layer) if method == "awq" else to_gptq(layer, version)
        elif isinstance(layer, GroupedLinear) and "weight_packed" in there:
            made = to_compressed_tensors(layer)
        else:
            made = dict(layer.entries())
            scales = next((made[n] for n in (_TILES, "weight_scale_rows") if n in made), None)
            if _SCALE in there and scales is not None:
                one = there[_SCALE].numel() == 1
                made[_SCALE] = scales.reshape(-1)[:1] if one else scales
        new = {}
        for leaf, old in there.items():
            if leaf not in made:
                new[leaf] = old
                continue
            tensor = made[leaf].to(old.device)
            if not leaf.startswith("weight.quant_state"):
                if tensor.dtype != old.dtype and tensor.itemsize >= old.itemsize:
                    tensor = tensor.to(old.dtype)
                if tensor.numel() == old.numel() and tensor.dtype == old.dtype:
                    tensor = tensor.reshape(old.shape)
                if tensor.shape != old.shape or tensor.dtype != old.dtype:
                    raise ValueError(
                        f"{path}.{leaf} is {list(old.shape)} {old.dtype} in the checkpoint, in a "
                        f"layout that is read and not made ({list(tensor.shape)} {tensor.dtype}); "
                        "merge to a dense model instead"
                    )
            new[leaf] = tensor.cpu().contiguous()
        return new

    def _one(self, name: str) -> Tensor:
        """What to write as ``name``."""
        path = self._path_of.get(name)
        if path is not None:
            if path not in self._made:
                there = {
                    _path_and_entry(each)[1]: self._tensors[each]
                    for each, of in self._path_of.items()
                    if of == path
                }
                self._made[path] = self._entries(path, self._layer_at[path], there)
            return self._made[path].pop(_path_and_entry(name)[1])
        found, old = self._rename(name), self._tensors[name]
        own = self._state.get(found if isinstance(found, str) else found.name)
        if own is not None:
            self._written.add(id(own))
        if own is None or isinstance(found, Piece) or own.shape != old.shape:
            return old
        here = own.detach().cpu()
        # What rounding to the model's dtype changed alone is not trained.
        return old if torch.equal(old.to(here.dtype), here) else here.to(old.dtype)


def _path_and_entry(name: str) -> tuple[str, str]:
    """``a.b.weight.absmax`` -> ``a.b`` and ``weight.absmax``, an entry of bitsandbytes'."""
    path, dot, entry = name.partition(".weight.")
    if dot:
        return path, f"weight.{entry}"
    path, _, entry = name.rpartition(".")
    return path, entry


def _check_all_written(state: Mapping[str, Tensor], written: set[int]) -> None:
    """Raise for parameters that the checkpoint has no name for, as of a head that was tied."""
    lacking = [
        name
        for name, tensor in state.items()
        if isinstance(tensor, nn.Parameter) and id(tensor) not in written
    ]
    if lacking:
        raise ValueError(
            f"the checkpoint has no place for {listed(lacking)}; merge to a dense model instead"
        )
