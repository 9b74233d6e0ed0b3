"""What mamba_ssm's mixers run on without a GPU, and what none of them may do."""

from __future__ import annotations

import pytest

from support.mixers import cuda_stand_ins, mamba_ssm_stand_ins
from support.mixers.adapted_families import forbid_reading_the_weight


@pytest.fixture
def stand_in_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA extensions are importable; they, and the fused functions, count from 0."""
    cuda_stand_ins.install(monkeypatch)
    mamba_ssm_stand_ins.fused_calls.clear()


@pytest.fixture
def weight_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may form W'."""
    forbid_reading_the_weight(monkeypatch)
