"""A save or a load that fails half way leaves the old adapter, or the model, as it was."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from prodial_kernels import load_adapter, save_adapter
from prodial_kernels.checkpoint.files import TENSOR_FILE
from support.saved_adapters import Model, state, trained


def test_a_failure_while_copying_undoes_the_application(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*args: object, **kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr("prodial_kernels.checkpoint.adapter._copy_into", out_of_memory)
    model = Model()
    with pytest.raises(MemoryError):
        load_adapter(model, directory)
    assert state(model) == state(Model())


def test_full_disk_keeps_the_old_adapter(directory: Path) -> None:
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = trained(seed=2)
    for limit in (0, 1000, len(before[TENSOR_FILE]) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                save_adapter(model, directory)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    load_adapter(Model(), directory)


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_adapter(trained(), tmp_path / "file" / "adapter")
