"""What a test on a device shares with those of the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

for folder in ("kernels", "mixers"):
    sys.path.append(str(Path(__file__).parent.parent / folder))


@pytest.fixture
def weight_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may form W'."""
    from adapted_families import forbid_reading_the_weight

    forbid_reading_the_weight(monkeypatch)
