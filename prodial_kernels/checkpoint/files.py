"""Replacing two files atomically: a kill at any moment leaves the old or the new adapter.

``adapter_config.json`` holds the SHA-256 of the tensors it belongs to, and replacing it is the
commit. New tensors are first written to ``adapter_model.<sha256>.<unique>.pending``, then the
configuration is replaced, then the pending file is renamed to its final name. A kill before the
commit leaves the old pair untouched; a kill after it leaves tensors that a reader finds under their
pending name. Of several processes that save to one directory each waits for the others.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prodial_kernels.checkpoint.error import AdapterError
from prodial_kernels.files.atomic import atomic_text, flush, left_beside, write_new
from prodial_kernels.files.locking import AlreadyLocked, locked
from prodial_kernels.files.sha256 import sha256_of_file, sha256_of_values

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
# 1: the scale is kept as s, and of the base a few values of each adapted weight. 2: as s - 1.
# 3: the tensors have PEFT's names in the file.
FORMAT_VERSION = 3
_READABLE = (1, 2, 3)
SECONDS_TO_WAIT = 300.0


def write_files(directory: Path, header: Mapping[str, Any], payload: bytes) -> None:
    """Replace the adapter in ``directory``, which is created if needed, in one step.

    Several processes may do so at once: the last one's adapter stays.

    Args:
        directory: Where the two files go.
        header: Content of the JSON file, without what this module adds: ``format_version``, the
            SHA-256 of ``payload``, and a checksum of the JSON content itself.
        payload: Content of the tensor file.

    Raises:
        AdapterError: ``adapter_config.json`` is of another library.
        OSError: The disk is full, or the place cannot be written, or another process has been
            saving to it for minutes. The directory then holds the adapter it held before, or the
            new one if the error came after the commit.
    """
    directory.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(payload).hexdigest()
    content = {"format_version": FORMAT_VERSION, **header, "tensors_sha256": digest}
    text = json.dumps({**content, "checksum": sha256_of_values(content)}, indent=2) + "\n"
    pending = directory / f"adapter_model.{digest}.{secrets.token_hex(8)}.pending"
    config = directory / CONFIG_FILE
    with _settle(directory):
        _check_own(config)
        try:
            write_new(pending, payload)
            flush(directory)
            atomic_text(config, text)
        except BaseException:
            # Asked of the disk, not of a variable: an interrupt may arrive just after the commit.
            with suppress(OSError):
                if _committed_digest(directory) != digest:
                    pending.unlink(missing_ok=True)
            raise
        os.replace(pending, directory / TENSOR_FILE)
        flush(directory)


def read_files(directory: Path) -> tuple[dict[str, Any], bytes]:
    """Return the content of the JSON file and of the tensor file, both verified.

    Raises:
        AdapterError: Something is missing, damaged, changed by hand, or of another version.
        OSError: A file exists but cannot be read.
    """
    # A save that ends between the reads of the two files changes the first; then look again.
    while True:
        version = _version(directory)
        header = _read_header(directory)
        digest = header["tensors_sha256"]
        payload = _find_payload(directory, digest)
        if payload is not None:
            return header, payload
        if _version(directory) == version:
            break
    path = directory / TENSOR_FILE
    if not path.exists():
        raise AdapterError(
            f"{path} is missing, but {CONFIG_FILE} beside it names it; copy both files of the "
            "adapter, or save it again"
        )
    if not path.is_file():
        raise AdapterError(f"{path} is not a regular file; copy both files of the adapter")
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
        header = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"{path} is not valid JSON ({error}): it is damaged; copy it again from where it "
            "was saved"
        ) from error
    if not isinstance(header, dict) or "format_version" not in header:
        kind = header.get("peft_type") if isinstance(header, dict) else None
        ours = ""
        if kind in ("PRODIAL", "LORA"):
            ours = f", or convert it: prodial convert {path.parent} --to prodial --output DIR"
        raise AdapterError(
            f"{path} has no format_version: "
            + (
                f"it is PEFT's, for {kind!r}; load it with peft{ours}"
                if kind
                else "it is not ProDiaL's"
            )
        )
    version = header["format_version"]
    if type(version) is not int or version not in _READABLE:
        raise AdapterError(
            f"{path} has format_version={version!r}, written by prodial-kernels "
            f"{header.get('package_version')!r}; this version reads "
            f"{', '.join(map(str, _READABLE))}: install one that reads it"
        )
    checksum = header.pop("checksum", None)
    if checksum != sha256_of_values(header):
        raise AdapterError(
            f"{path} was changed after it was saved: its checksum does not match; copy it again "
            "from where it was saved, or load it unchanged and save it with other options"
        )
    if _named_digest(header) is None:
        raise AdapterError(f"{path} has no SHA-256 in tensors_sha256; save the adapter again")
    return header


def _find_payload(directory: Path, digest: str) -> bytes | None:
    """Return the tensor file's content if it has the SHA-256 ``digest``, pending or final."""
    final = directory / TENSOR_FILE
    # The final name again: a pending file may have taken it between the two looks.
    for path in (final, *_pending(directory, digest), final):
        with suppress(FileNotFoundError):
            if not path.is_file():
                continue
            payload = path.read_bytes()
            if hashlib.sha256(payload).hexdigest() == digest:
                return payload
    return None


def _version(directory: Path) -> tuple[int, int, int] | None:
    """Return an identity of the JSON file, which changes with every commit."""
    try:
        found = os.stat(directory / CONFIG_FILE)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


@contextmanager
def _settle(directory: Path) -> Iterator[None]:
    """Lock the directory, and first finish a save that was killed, or remove its traces."""
    try:
        with locked(directory, wait=SECONDS_TO_WAIT):
            digest = _committed_digest(directory)
            tensors = directory / TENSOR_FILE
            if digest is not None and not _has_digest(tensors, digest):
                for pending in _pending(directory, digest):
                    if _has_digest(pending, digest):
                        os.replace(pending, tensors)
                        flush(directory)
                        break
            for leftover in _leftovers(directory):
                leftover.unlink(missing_ok=True)
            yield
    except AlreadyLocked as error:
        waited = f"another process has been saving for {SECONDS_TO_WAIT:.0f} s ({error})"
        raise TimeoutError(errno.ETIMEDOUT, waited, str(directory)) from error


def _leftovers(directory: Path) -> list[Path]:
    form = re.compile(r"adapter_model\.[0-9a-f]{64}(\.[0-9a-f]{16})?\.pending")
    found = [path for path in directory.iterdir() if form.fullmatch(path.name)]
    config = directory / CONFIG_FILE
    found += left_beside(config, "partial")
    # What earlier versions called their temporary files.
    found += [*left_beside(config, "tmp"), directory / f".{CONFIG_FILE}.tmp"]
    return [path for path in found if path.is_file() or path.is_symlink()]


def _check_own(path: Path) -> None:
    """Raise where a save would replace another library's file; an unreadable one is replaced."""
    header = _readable(path)
    if header is not None and "format_version" not in header:
        raise AdapterError(
            f"{path} is of another library, such as PEFT, and is left alone; save to another "
            "directory"
        )


def _committed_digest(directory: Path) -> str | None:
    """The SHA-256 that the JSON file names, or None where there is no readable one."""
    return _named_digest(_readable(directory / CONFIG_FILE) or {})


def _named_digest(header: Mapping[str, Any]) -> str | None:
    digest = header.get("tensors_sha256")
    return digest if isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) else None


def _readable(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file, {} where it is no object; None for no file or no JSON."""
    if not path.is_file():
        return None
    try:
        header = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return header if isinstance(header, dict) else {}


def _has_digest(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_of_file(path) == digest


def _pending(directory: Path, digest: str) -> list[Path]:
    # Earlier versions left out the unique part.
    return sorted(directory.glob(f"adapter_model.{digest}*.pending"))
