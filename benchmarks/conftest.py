"""``pytest benchmarks --benchmark-only``: real shapes on a GPU, tiny ones on a CPU."""

from __future__ import annotations

from benchmarks.harness.startup import prepare_process

prepare_process()
