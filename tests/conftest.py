"""Fixtures for every test: seeded, offline, and no memory that happens to hold good values."""

from __future__ import annotations

import os

# Before anything imports them: no hub look-ups, no thread fight between test workers.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
