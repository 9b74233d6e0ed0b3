"""Checkpoints whose projectors GPTQ, AWQ, compressed-tensors or ModelOpt have stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.stored.grouped_weights import awq, case, compressed, gptq

PROJECTORS = ("in_proj.weight", "out_proj.weight")
WEIGHTS = {"num_bits": 8, "type": "float"}
CONFIGS: dict[str, dict[str, Any]] = {
    "modelopt": {
        "quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"],
        "producer": {"name": "modelopt", "version": "0.33.0"}, "kv_cache_scheme": None,
        "config_groups": {"group_0": {"weights": WEIGHTS | {"dynamic": False}}},
    },
    "compressed-tensors": {
        "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
        "quantization_status": "compressed", "sparsity_config": {}, "transform_config": {},
        "config_groups": {
            "group_0": {
                "weights": WEIGHTS | {"strategy": "channel", "symmetric": True, "group_size": None},
                "input_activations": WEIGHTS | {"strategy": "token", "dynamic": True},
            }
        },
    },
}  # fmt: skip


def pack_whole(folder: Path, method: str, layers: tuple[str, ...]) -> dict[str, Tensor]:
    """Store layers of a checkpoint as ``method`` does; return the weights that they stand for."""
    file = folder / "model.safetensors"
    tensors, exact = load_file(file), {}
    for name in [n for n in tensors if n.endswith(layers)]:
        weight, path = tensors[name].float(), name.removesuffix(".weight")
        rows = method == "compressed-tensors"
        scale = weight.abs().amax(1, keepdim=True) if rows else weight.abs().max()
        scale = scale / 448
        tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{path}.weight_scale"] = scale.bfloat16() if rows else scale
        tensors[f"{path}.input_scale"] = torch.tensor(0.5)
        exact[name] = tensors[name].float() * tensors[f"{path}.weight_scale"].float()
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = CONFIGS[method]
    (folder / "config.json").write_text(json.dumps(config))
    return exact


def packed(method: str, kind: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    if method == "gptq":
        return {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": True, "sym": False,
                "checkpoint_format": "gptq", "pack_dtype": "int32",
                "meta": {"quantizer": ["gptqmodel:7.7.0"]}}  # fmt: skip
    if method == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True,
                "version": "gemm", "modules_to_not_convert": None}  # fmt: skip
    own = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 8,
           "actorder": None, "block_structure": None, "dynamic": False, **weights}  # fmt: skip
    group = {"targets": ["Linear"], "weights": own, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": kind, "ignore": ["lm_head"],
            "quantization_status": "compressed", "config_groups": {"group_0": group}}  # fmt: skip


def pack(folder: Path, config: dict[str, Any], layers: tuple[str, ...]) -> dict[str, Tensor]:
    """Store layers of a checkpoint as a method does; return the weights that they stand for."""
    file, method = folder / "model.safetensors", config["quant_method"]
    tensors, exact = load_file(file), {}
    for name in [n for n in tensors if n.endswith(layers)]:
        weight, path = tensors.pop(name), name.removesuffix(".weight")
        of = case(*weight.shape, group=8, shuffled=method == "gptq")
        of.scales *= 0.02 / of.scales.float().mean()
        pack_one = {"gptq": gptq, "awq": awq, "compressed-tensors": compressed}[method]
        tensors |= {f"{path}.{entry}": t.contiguous() for entry, t in pack_one(of).items()}
        # A product of 16 bits is exact in fp32.
        exact[name] = of.weight(torch.float32)
    write(folder, tensors, config)
    return exact


def write(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
