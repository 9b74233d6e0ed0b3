"""Two files that change together: a kill at any moment leaves the old or the new adapter.

``adapter_config.json`` holds the SHA-256 of the tensors it belongs to, and replacing it is the
commit. New tensors first become ``adapter_model.<sha256>.pending``, then the configuration is
replaced, then the pending file takes its final name. A kill before the commit leaves the old pair
untouched; a kill after it leaves tensors that a reader finds under their pending name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from prodial_kernels.checkpoint.error import AdapterError

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
FORMAT_VERSION = 1


def write_files(directory: Path, header: Mapping[str, Any], payload: bytes) -> None:
    """Replace the adapter in ``directory``, which is created if needed, in one step.

    Call it from one process at a time.

    Args:
        directory: Where the two files go.
        header: Content of the JSON file, without what this module adds: ``format_version``, the
            SHA-256 of ``payload``, and a checksum of the JSON content itself.
        payload: Content of the tensor file.

    Raises:
        OSError: The disk is full, or the place cannot be written. The directory then holds the
            adapter it held before, or the new one if the error came after the commit.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _settle(directory)
    digest = hashlib.sha256(payload).hexdigest()
    content = {"format_version": FORMAT_VERSION, **header, "tensors_sha256": digest}
    text = json.dumps({**content, "checksum": _checksum(content)}, indent=2) + "\n"
    pending = _pending(directory, digest)
    temporary = directory / f".{CONFIG_FILE}.tmp"
    try:
        _write_durably(pending, payload)
        _write_durably(temporary, text.encode())
        _flush_directory(directory)
        os.replace(temporary, directory / CONFIG_FILE)
    except BaseException:
        # Asked of the disk, not of a variable: an interrupt may arrive just after the commit.
        with suppress(OSError):
            if _committed_digest(directory) != digest:
                pending.unlink(missing_ok=True)
            temporary.unlink(missing_ok=True)
        raise
    _flush_directory(directory)
    os.replace(pending, directory / TENSOR_FILE)
    _flush_directory(directory)


def read_files(directory: Path) -> tuple[dict[str, Any], bytes]:
    """Return the content of the JSON file and of the tensor file, both verified.

    Raises:
        AdapterError: Something is missing, damaged, changed by hand, or of another version.
        OSError: A file exists but cannot be read.
    """
    # A save that ends between the reads of the two files changes the first; then look again.
    while True:
        header = _read_header(directory)
        digest = header["tensors_sha256"]
        payload = _find_payload(directory, digest)
        if payload is not None:
            return header, payload
        if _committed_digest(directory) == digest:
            break
    path = directory / TENSOR_FILE
    if not path.exists():
        raise AdapterError(
            f"{path} is missing, but {CONFIG_FILE} beside it names it; copy both files of the "
            "adapter, or save it again"
        )
    raise AdapterError(
        f"{path} is damaged or belongs to another {CONFIG_FILE}: its SHA-256 is not {digest} "
        f"(it has {path.stat().st_size:,} bytes); copy both files again from where they were saved"
    )


def _read_header(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise AdapterError(
            f"{directory}: no such directory; give the directory that save_adapter wrote"
        )
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"{path} is missing; give the directory that save_adapter wrote")
    try:
        header = json.loads(path.read_bytes())
    except ValueError as error:
        raise AdapterError(
            f"{path} is not valid JSON ({error}): it is damaged; copy it again from where it "
            "was saved"
        ) from error
    if not isinstance(header, dict) or "format_version" not in header:
        kind = header.get("peft_type") if isinstance(header, dict) else None
        raise AdapterError(
            f"{path} has no format_version: "
            + (f"it is PEFT's, for {kind}; load it with peft" if kind else "it is not ProDiaL's")
        )
    version = header["format_version"]
    if version != FORMAT_VERSION:
        raise AdapterError(
            f"{path} has format_version={version!r}, written by prodial-kernels "
            f"{header.get('package_version')}; this version reads {FORMAT_VERSION}: install one "
            "that reads it"
        )
    checksum = header.pop("checksum", None)
    if checksum != _checksum(header):
        raise AdapterError(
            f"{path} was changed after it was saved: its checksum does not match; copy it again "
            "from where it was saved, or load it unchanged and save it with other options"
        )
    if not isinstance(header.get("tensors_sha256"), str):
        raise AdapterError(f"{path} has no tensors_sha256; save the adapter again")
    return header


def _find_payload(directory: Path, digest: str) -> bytes | None:
    """Return the tensor file's content if it has the SHA-256 ``digest``, pending or final."""
    for path in (directory / TENSOR_FILE, _pending(directory, digest)):
        with suppress(FileNotFoundError):
            payload = path.read_bytes()
            if hashlib.sha256(payload).hexdigest() == digest:
                return payload
    return None


def _settle(directory: Path) -> None:
    """Finish a save that was killed after its commit, and remove what any other one left."""
    digest = _committed_digest(directory)
    tensors = directory / TENSOR_FILE
    if digest is not None and not _has_digest(tensors, digest):
        pending = _pending(directory, digest)
        if _has_digest(pending, digest):
            os.replace(pending, tensors)
            _flush_directory(directory)
    for leftover in directory.glob("adapter_model.*.pending"):
        leftover.unlink(missing_ok=True)


def _committed_digest(directory: Path) -> str | None:
    """The SHA-256 that the JSON file names, or None where there is no readable one."""
    try:
        header = json.loads((directory / CONFIG_FILE).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    digest = header.get("tensors_sha256") if isinstance(header, dict) else None
    return digest if isinstance(digest, str) else None


def _has_digest(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


def _pending(directory: Path, digest: str) -> Path:
    return directory / f"adapter_model.{digest}.pending"


def _checksum(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _write_durably(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_directory(directory: Path) -> None:
    """Make renames in ``directory`` survive a power cut, where the system lets one ask for it."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
