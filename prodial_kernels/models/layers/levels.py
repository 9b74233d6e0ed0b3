"""How much a block keeps for its backward pass, as the levels that a memory plan chooses from."""

from __future__ import annotations

KEEP, NORM, RECOMPUTE, CHECKPOINT = "keep", "norm", "recompute", "checkpoint"
LEVELS = (KEEP, NORM, RECOMPUTE, CHECKPOINT)
"""From the fastest to the smallest."""

LEVEL_TEXTS = {
    KEEP: "keep what the fused operations need",
    NORM: "compute the norm before in_proj again",
    RECOMPUTE: "compute the norm and in_proj's output again",
    CHECKPOINT: "keep one residual, compute the block again",
}
