"""A save beside other processes, other libraries' files, links, and files that are no adapter's."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from prodial_kernels.checkpoint import files
from prodial_kernels.checkpoint.error import AdapterError
from prodial_kernels.checkpoint.files import CONFIG_FILE, TENSOR_FILE, read_files, write_files
from prodial_kernels.files.atomic import beside
from prodial_kernels.files.locking import locked
from prodial_kernels.files.sha256 import sha256_of_values

OLD, NEW = b"old tensors" * 1000, b"new tensors" * 1000


def save(directory: Path, payload: bytes) -> None:
    write_files(directory, {"config": {"name": payload[:3].decode()}}, payload)


def check_whole(directory: Path) -> bytes:
    """Read the adapter; its two files belong together, whichever save they are of."""
    header, payload = read_files(directory)
    assert header["config"] == {"name": payload[:3].decode()}
    return payload


def test_who_waits_too_long_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SECONDS_TO_WAIT", 0.0)
    with locked(tmp_path), pytest.raises(TimeoutError, match="another process has been saving"):
        save(tmp_path, OLD)


def test_a_save_follows_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever guesses a temporary name must not choose which file is overwritten."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    directory = tmp_path / "adapter"
    save(directory, OLD)
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "0" * 2 * n)
    digest = hashlib.sha256(NEW).hexdigest()
    names = {
        TENSOR_FILE,
        f".{CONFIG_FILE}.tmp",
        beside(directory / CONFIG_FILE, "tmp").name,
        f"adapter_model.{digest}.pending",
        f"adapter_model.{digest}.{'0' * 16}.pending",
    }
    real = files.write_new
    for name in sorted(names):
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(precious)

        def late(path: Path, data: bytes, name: str = name) -> None:
            # Those of killed saves were removed by now; it is put in place again.
            if not (directory / name).is_symlink() and name != TENSOR_FILE:
                (directory / name).symlink_to(precious)
            real(path, data)

        monkeypatch.setattr(files, "write_new", late)
        with suppress(FileExistsError):
            save(directory, NEW)
        monkeypatch.setattr(files, "write_new", real)
        save(directory, OLD)
        assert check_whole(directory) == OLD
    assert precious.read_text() == "mine"
    assert sorted(path.name for path in directory.iterdir()) == [CONFIG_FILE, TENSOR_FILE]


@pytest.mark.parametrize("digest", ["\0", "", "../" * 8, "a" * 63, "A" * 64, 7, None])
def test_a_hash_that_is_none_is_refused(tmp_path: Path, digest: Any) -> None:
    save(tmp_path, OLD)
    header = json.loads((tmp_path / CONFIG_FILE).read_text())
    header = {**header, "tensors_sha256": digest}
    del header["checksum"]
    text = json.dumps({**header, "checksum": sha256_of_values(header)})
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(AdapterError, match="no SHA-256"):
        read_files(tmp_path)
    save(tmp_path, NEW)
    assert check_whole(tmp_path) == NEW


def test_nested_too_deep_is_refused_and_replaced(tmp_path: Path) -> None:
    save(tmp_path, OLD)
    (tmp_path / CONFIG_FILE).write_text("[" * 100_000)
    with pytest.raises(AdapterError, match="not valid JSON"):
        read_files(tmp_path)
    save(tmp_path, NEW)
    assert check_whole(tmp_path) == NEW


@pytest.mark.parametrize("text", ['{"peft_type": "LORA"}', "{}", "[]"])
def test_another_librarys_adapter_stays(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG_FILE).write_text(text)
    (tmp_path / TENSOR_FILE).write_bytes(b"mine")
    with pytest.raises(AdapterError, match="is of another library"):
        save(tmp_path, NEW)
    assert (tmp_path / CONFIG_FILE).read_text() == text
    assert (tmp_path / TENSOR_FILE).read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", [CONFIG_FILE, TENSOR_FILE])
def test_a_file_that_never_ends_is_refused_and_replaced(tmp_path: Path, name: str) -> None:
    save(tmp_path, OLD)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(AdapterError, match=r"is missing|is not a regular file"):
        read_files(tmp_path)
    save(tmp_path, NEW)
    assert check_whole(tmp_path) == NEW
