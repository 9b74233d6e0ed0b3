"""The saved adapter that most tests start from."""

from __future__ import annotations

from pathlib import Path

import pytest
from saved_adapters import trained

from prodial_kernels import save_adapter


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_adapter(trained(), tmp_path / "adapter")
    return tmp_path / "adapter"
