"""Which process of a run this is, as ``torchrun`` and ``accelerate launch`` say it.

Nothing heavy is imported: the command line asks before it loads PyTorch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LaunchError(RuntimeError):
    """The processes of a run cannot work together as they were started."""


@dataclass(frozen=True)
class Launch:
    """This process among those of a run.

    Attributes:
        rank: Its number, from 0.
        size: How many there are.
        local_rank: Its number among those of this machine: which GPU it has.
        restarts: How often the launcher has started all of them again, after one failed.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks for all."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """Read what the launcher has set; one process by itself where there was none.

        Raises:
            LaunchError: The values contradict each other.
        """
        # A scheduler may set a part of them for other programs.
        if any(name not in environment for name in _NEEDED):
            return cls()
        values = {name: environment[name] for name in ("RANK", "WORLD_SIZE")}
        values["LOCAL_RANK"] = environment.get("LOCAL_RANK", "0")
        values["TORCHELASTIC_RESTART_COUNT"] = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        try:
            rank, size, local, restarts = (int(value) for value in values.values())
            good = 0 <= rank < size and local >= 0 and restarts >= 0
        except ValueError:
            good = False
        if not good:
            said = ", ".join(f"{name}={value}" for name, value in values.items())
            raise LaunchError(
                f"the environment says {said}, which cannot be; start with torchrun "
                "--nproc-per-node N, or remove these variables to run in one process"
            )
        return cls(rank, size, local, restarts)


def tell_launcher(message: str, environment: Mapping[str, str] = os.environ) -> None:
    """Let torchrun's summary of what failed, the last thing on the screen, hold a message."""
    file = environment.get("TORCHELASTIC_ERROR_FILE")
    if file:
        with suppress(OSError), open(file, "w", encoding="utf-8") as stream:
            json.dump({"message": message, "timestamp": str(int(time.time()))}, stream)
