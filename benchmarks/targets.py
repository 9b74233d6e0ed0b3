"""What the package must reach, written once: what every ``must`` in a table comes from.

The limits of fine-tuning jobs are with the jobs (:mod:`benchmarks.training.jobs`).
"""

from __future__ import annotations

from collections.abc import Mapping

# One projector, by M, K, N: time over the frozen layer's on an H100 at P = 1, r = 16, bf16:
# (must, aim).
PROJECTOR: Mapping[tuple[int, int, int], tuple[float, float]] = {
    (2048, 768, 3072): (2.1, 1.6),
    (2048, 1536, 768): (2.3, 1.8),
    (16384, 768, 3072): (1.60, 1.35),
    (16384, 1536, 768): (1.80, 1.5),
    (8192, 2048, 8192): (1.33, 1.15),
    (8192, 4096, 2048): (1.45, 1.25),
    (16384, 2048, 8192): (1.30, 1.12),
    (16384, 4096, 2048): (1.42, 1.2),
}
# The same on fp8 tensor cores, over the frozen layer in bf16, on an H200.
PROJECTOR_IN_FP8: Mapping[tuple[int, int, int], tuple[float, float]] = {
    (8192, 2048, 8192): (0.90, 0.75),
    (8192, 4096, 2048): (1.00, 0.85),
    (16384, 2048, 8192): (0.88, 0.72),
    (16384, 4096, 2048): (0.98, 0.82),
    (2048, 4096, 16384): (0.95, 0.80),
    (16384, 768, 3072): (1.15, 1.00),
}
# Larger blocks and ranks over P = 1 and r = 16; peak memory over the frozen layer's; host time.
VARIANT_LIMIT, MEMORY_LIMIT, HOST_LIMIT_US = 1.15, 1.10, 150.0

# A whole mamba_ssm model, by (model, batch, length): most time and memory over the frozen one's.
MODEL: Mapping[tuple[str, int, int], tuple[float, float]] = {
    ("mamba-130m", 4, 512): (1.25, 1.10),
    ("mamba-130m", 8, 2048): (1.20, 1.10),
    ("mamba-1.4b", 4, 512): (1.15, 1.10),
    ("mamba-1.4b", 4, 2048): (1.15, 1.10),
    ("mamba2-130m", 4, 512): (1.25, 1.10),
    ("mamba2-130m", 4, 2048): (1.20, 1.10),
    ("mamba2-1.3b", 4, 512): (1.15, 1.10),
    ("mamba2-1.3b", 4, 2048): (1.15, 1.10),
}

# MambaPEFT's methods on such a model, likewise: each of them, in the mixers' blocks. With 2,040
# tokens those that insert a few fit into one chunk of mamba_ssm's scan, as they do not with 2,048.
METHOD: Mapping[tuple[str, int, int], tuple[float, float]] = {
    ("mamba-130m", 8, 2048): (1.25, 1.15),
    ("mamba-130m", 8, 2040): (1.25, 1.15),
}

# A captured step in transformers' Trainer: at most so many ms, of the faster LoRA's time, of the
# frozen model's; and never more memory than the step that is not captured.
TRAINER_MS = {("mamba-130m", 4, 512): 24.0}
TRAINER_OF_LORA = {("mamba2-130m", 4, 512): 0.35}
TRAINER_OF_FROZEN = {("mamba-130m", 8, 2048): 0.85, ("mamba2-130m", 8, 2048): 0.85}

# Two GPUs beside one: units of 2^-23 in the norm of a gradient, or twice what repeating it on one
# GPU changes if that is more; relative loss of a whole run, likewise; tokens/s over one GPU's.
GRADIENT_ULPS = 4.0
LOSS_OF_TWO = 1e-4
OVER_ONE_ON_TWO = 1.9
SECONDS_AFTER_A_KILL = 15.0
