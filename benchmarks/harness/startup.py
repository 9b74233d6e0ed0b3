"""What torch and Triton read from the environment when they are imported; set before that."""

from __future__ import annotations

import os

# Fifteen processes that compile side by side and start fifteen compilers each would only swap.
# Kineto's level keeps the profiler's chatter from between the tables. What is measured is what is
# installed, not what a hub has.
SETTINGS = {
    "TORCHINDUCTOR_COMPILE_THREADS": "1", "KINETO_LOG_LEVEL": "5", "HF_HUB_OFFLINE": "1",
}  # fmt: skip


def prepare_process() -> None:
    """Set what the user has not set."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
