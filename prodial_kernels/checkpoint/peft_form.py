"""What of an adapter's two files is as PEFT writes it, so that PEFT and transformers read them too.

Their loaders want tensors by the names of a ``PeftModel`` and the fields of ``ProdialPeftConfig``;
``import prodial_kernels.peft`` tells them of the method. What is this package's own (the base
model's fingerprint, checksums) stands beside these fields, and PEFT leaves it out.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from prodial_kernels.checkpoint.error import AdapterError
from prodial_kernels.config import ProdialConfig
from prodial_kernels.models.adapt.named_layer import PARTS

PEFT_TYPE = "PRODIAL"
_PREFIX = "base_model.model."
_PLAIN = {f"{theirs}.weight": ours for ours, theirs in PARTS.items()}
# Options that PEFT's configuration has not.
_OWN_OPTIONS = frozenset(("allow_partial", "train_ssm", "modules_to_save", "methods"))


def file_name(name: str) -> str:
    """Return the name in the file of a tensor by its plain name, ``<module path>.prodial_a``."""
    path, _, part = name.rpartition(".")
    return f"{_PREFIX}{path}.{PARTS[part]}.weight" if part in PARTS else _PREFIX + name


def plain_name(name: str) -> str:
    """Return the plain name of a tensor of a file; AdapterError for a name that no file has."""
    if not name.startswith(_PREFIX):
        raise AdapterError(f"the file of tensors holds {name!r}, which does not begin {_PREFIX!r}")
    plain = name.removeprefix(_PREFIX)
    head, _, last = plain.rpartition(".")
    path, _, part = head.rpartition(".")
    ours = _PLAIN.get(f"{part}.{last}")
    return plain if ours is None else f"{path}.{ours}"


def peft_fields(
    model: nn.Module, config: ProdialConfig, base_model: str | None, *, beside: bool
) -> dict[str, Any]:
    """Return the fields by which PEFT recognises an adapter; none for what it has no place for.

    Args:
        model: What it adapts. PEFT finds the class of a causal language model by its task.
        config: Of the adapter.
        base_model: The base model's name, or None.
        beside: Whether the file holds tensors beside the adapter's.
    """
    if beside or config.train_ssm or config.methods:
        return {}
    options = {k: v for k, v in config.to_dict().items() if k not in _OWN_OPTIONS}
    return {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        **options,
    }
