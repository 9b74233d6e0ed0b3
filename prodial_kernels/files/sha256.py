"""SHA-256 of what is kept on the disk: of a file, and of the values in a JSON file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20


def sha256_of_file(path: Path) -> str:
    """Return 64 hexadecimal digits of a file's bytes, of which one MiB is held at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_values(values: Mapping[str, Any]) -> str:
    """Return 64 hexadecimal digits of JSON values, whatever the order of their names."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
