"""Files of Debian packages, without installing them: downloaded and unpacked side by side."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

__all__ = ["package_version", "unpacked"]


def unpacked(packages: Iterable[str], work: Path) -> dict[str, Path]:
    """Download what ``work`` lacks, unpack it, and return each package's folder.

    Args:
        packages: Names of binary packages, as ``apt-get download`` knows them.
        work: Keeps archives (``deb/``) and files (``unpacked/``); used again when run again.

    Raises:
        subprocess.CalledProcessError: ``apt-get`` or ``dpkg-deb`` failed.
    """
    names = list(packages)
    archives = work / "deb"
    archives.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not any(archives.glob(f"{name}_*.deb"))]
    if missing:
        subprocess.run(["apt-get", "-q", "download", *missing], cwd=archives, check=True)
    folders = {}
    for name in names:
        folders[name] = work / "unpacked" / name
        if not folders[name].exists():
            part = folders[name].with_suffix(".part")
            part.mkdir(parents=True, exist_ok=True)
            archive = next(archives.glob(f"{name}_*.deb"))
            subprocess.run(["dpkg-deb", "-x", str(archive), str(part)], check=True)
            part.rename(folders[name])
    return folders


def package_version(package: str, work: Path) -> str:
    """Return the version of a package that :func:`unpacked` has downloaded."""
    archive = next((work / "deb").glob(f"{package}_*.deb"))
    command = ["dpkg-deb", "-f", str(archive), "Version"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
