"""The saved adapter that most tests start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from prodial_kernels import save_adapter
from support.saved_adapters import trained


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_adapter(trained(), tmp_path / "adapter")
    return tmp_path / "adapter"
