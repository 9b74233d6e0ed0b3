"""Adapters on disk: what they hold, which base model they belong to, and how they are written."""

from prodial_kernels.checkpoint.adapter import (
    SavedAdapter,
    load_adapter,
    read_adapter,
    save_adapter,
)
from prodial_kernels.checkpoint.error import AdapterError
from prodial_kernels.checkpoint.fingerprint import model_fingerprint
from prodial_kernels.checkpoint.hub import fetch_adapter, push_adapter

__all__ = [
    "AdapterError",
    "SavedAdapter",
    "fetch_adapter",
    "load_adapter",
    "model_fingerprint",
    "push_adapter",
    "read_adapter",
    "save_adapter",
]
