"""Written by ``python -m benchmarks.tune``. Data only: see ``tuned.py`` for the key."""

from collections.abc import Mapping

TABLE: Mapping[tuple[str, str, int, int, int, int, str], Mapping[str, int | bool]] = {}
