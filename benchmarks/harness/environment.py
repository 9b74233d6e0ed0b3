"""Where a figure comes from: device, driver, versions, sources, date and command."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from typing import Any

import torch

from benchmarks.harness import sources

ROOT = sources.ROOT
PACKAGES = (
    "torch", "triton", "prodial-kernels", "transformers", "peft", "mamba-ssm", "liger-kernel",
    "numpy",
)  # fmt: skip


def describe(device: str, command: str) -> dict[str, Any]:
    """Return the record that goes into every result."""
    return {
        "device": device_name(device),
        "device_details": _details(device),
        "driver": _smi("driver_version"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit(),
        "sources": sources.hash_of((ROOT / "prodial_kernels").rglob("*.py")),
        "date": datetime.date.today().isoformat(),
        "command": command,
    }


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's architecture."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}"


def slug(name: str) -> str:
    """A device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cache_bytes(device: str) -> int:
    """Size of the last cache before memory; of a CPU's a guess that suits the tiny mode."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return 2**20


def cpu_count() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str | None:
    """The commit of the working tree, with ``+changes`` where it differs; None outside git."""
    head = git("rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("+changes" if git("status", "--porcelain", "--", "prodial_kernels") else "")


def git(*arguments: str) -> str | None:
    """Output of a git command in the repository, or None if it fails or there is none."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def clocks() -> str | None:
    """SM clock, power and temperature now, as the driver reports them."""
    return _smi("clocks.sm,power.draw,temperature.gpu")


def _details(device: str) -> dict[str, Any]:
    if not device.startswith("cuda"):
        return {"cpus": cpu_count(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_mib": properties.total_memory // 2**20,
        "l2_mib": cache_bytes(device) / 2**20,
        "cpus": cpu_count(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        module = sys.modules.get(name.replace("-", "_"))
        return getattr(module, "__version__", None)


def _smi(query: str) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"],
        capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.strip() if done.returncode == 0 else None
