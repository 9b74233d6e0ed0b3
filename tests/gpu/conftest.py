"""What a test on a device shares with those of the CPU."""

from __future__ import annotations

import pytest


@pytest.fixture
def weight_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may form W'."""
    from support.mixers.adapted_families import forbid_reading_the_weight

    forbid_reading_the_weight(monkeypatch)
