"""Whether the trained parameters are the same in every process, as they must be at every step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor

from prodial_kernels.checkpoint.hashing import hash_tensor
from prodial_kernels.training.distributed.world import PeerError, World


def check_replicas(world: World, parameters: Sequence[Tensor]) -> None:
    """Raise PeerError, in every process, unless all have the same values."""
    if world.size == 1:
        return
    digest = hashlib.sha256("".join(map(hash_tensor, parameters)).encode()).hexdigest()
    found = world.gather(digest)
    other = next((rank for rank, theirs in enumerate(found) if theirs != found[0]), None)
    if other is not None:
        raise PeerError(
            f"the trained parameters of processes 0 and {other} of {world.size} are no longer the "
            "same: a machine computes something else than the others; what was saved before is "
            "good, resume from it"
        )
