"""What the package must reach, written once: what every ``must`` in a table comes from.

The limits of fine-tuning jobs are with the jobs (:mod:`benchmarks.training.jobs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one projector may take, forward and backward, × the frozen layer's.

    Attributes:
        must: Time that a row misses its target above; None where it only has to beat every rival.
        aim: Time that is aimed at.
        memory: Most peak memory; None where none is set.
    """

    must: float | None = None
    aim: float | None = None
    memory: float | None = None


# Memory: the first design's shapes with many tokens; few tokens with large layers, and hybrids.
MANY_TOKENS, FEW_TOKENS = 1.10, 1.15
# (K, N) of both projectors: Nemotron-3-Nano-30B-A3B, Nemotron-H-8B, Granite-4.0-H-Micro.
_HYBRIDS = (
    (2688, 10304), (4096, 2688), (4096, 18560), (8192, 4096), (2048, 8512), (4096, 2048),
)  # fmt: skip

# One projector in bf16 at P = 1, by M, K, N, r. On the H100 the first design's eight shapes.
_ON_H100: Mapping[tuple[int, int, int, int], Limits] = {
    (2048, 768, 3072, 16): Limits(2.1, 1.6),
    (2048, 1536, 768, 16): Limits(2.3, 1.8),
    (16384, 768, 3072, 16): Limits(1.60, 1.35, MANY_TOKENS),
    (16384, 1536, 768, 16): Limits(1.80, 1.5, MANY_TOKENS),
    (8192, 2048, 8192, 16): Limits(1.33, 1.15),
    (8192, 4096, 2048, 16): Limits(1.45, 1.25),
    (16384, 2048, 8192, 16): Limits(1.30, 1.12, MANY_TOKENS),
    (16384, 4096, 2048, 16): Limits(1.42, 1.2, MANY_TOKENS),
}
# On the H200 also hybrids, vision, few tokens against large weights, wide ranks.
_ON_H200: Mapping[tuple[int, int, int, int], Limits] = {
    **{(m, *kn, 16): Limits(memory=FEW_TOKENS) for m in (2048, 8192) for kn in _HYBRIDS},
    (25216, 192, 768, 16): Limits(1.60, 1.35),
    (25216, 384, 192, 16): Limits(1.90, 1.50),
    (2048, 2560, 10240, 16): Limits(1.30, 1.20, FEW_TOKENS),
    (2048, 5120, 2560, 16): Limits(1.40, 1.25, FEW_TOKENS),
    (2048, 4096, 16384, 16): Limits(1.18, 1.10, FEW_TOKENS),
    (2048, 8192, 4096, 16): Limits(1.25, 1.15, FEW_TOKENS),
    (512, 768, 3072, 16): Limits(2.00, 1.70),
    (8192, 2048, 8192, 64): Limits(1.22, 1.15),
    (8192, 2048, 8192, 128): Limits(1.45, 1.30),
    (8192, 2048, 8192, 256): Limits(aim=1.60),
    (2048, 768, 3072, 16): Limits(1.60, 1.40),
    (2048, 1536, 768, 16): Limits(1.85, 1.60),
    (16384, 768, 3072, 16): Limits(1.28, 1.18, MANY_TOKENS),
    (16384, 1536, 768, 16): Limits(1.45, 1.30, MANY_TOKENS),
    (8192, 2048, 8192, 16): Limits(1.14, 1.08),
    (8192, 4096, 2048, 16): Limits(1.22, 1.15),
    (16384, 2048, 8192, 16): Limits(1.12, 1.07, MANY_TOKENS),
    (16384, 4096, 2048, 16): Limits(1.20, 1.12, MANY_TOKENS),
}


def of_projector(device: str) -> tuple[Mapping[tuple[int, int, int, int], Limits], float]:
    """Return what single projectors may take on a ``device`` (its name).

    Returns:
        Limits by M, K, N, r, and the most µs of the host's for a forward and backward.
    """
    return (_ON_H200, 350.0) if "H200" in device else (_ON_H100, 150.0)


# The same on fp8 tensor cores, over the frozen layer in bf16, on an H200.
PROJECTOR_IN_FP8: Mapping[tuple[int, int, int], tuple[float, float]] = {
    (8192, 2048, 8192): (0.90, 0.75),
    (8192, 4096, 2048): (1.00, 0.85),
    (16384, 2048, 8192): (0.88, 0.72),
    (16384, 4096, 2048): (0.98, 0.82),
    (2048, 4096, 16384): (0.95, 0.80),
    (16384, 768, 3072): (1.15, 1.00),
}
# Larger blocks and ranks over P = 1 and r = 16.
VARIANT_LIMIT = 1.15

# A whole mamba_ssm model, by (model, batch, length): most time and memory over the frozen one's.
# On the H100 the first design's.
_MODEL_ON_H100: Mapping[tuple[str, int, int], tuple[float, float]] = {
    ("mamba-130m", 4, 512): (1.25, 1.10),
    ("mamba-130m", 8, 2048): (1.20, 1.10),
    ("mamba-1.4b", 4, 512): (1.15, 1.10),
    ("mamba-1.4b", 4, 2048): (1.15, 1.10),
    ("mamba2-130m", 4, 512): (1.25, 1.10),
    ("mamba2-130m", 4, 2048): (1.20, 1.10),
    ("mamba2-1.3b", 4, 512): (1.15, 1.10),
    ("mamba2-1.3b", 4, 2048): (1.15, 1.10),
}
_MODEL_ON_H200: Mapping[tuple[str, int, int], tuple[float, float]] = {
    ("mamba-130m", 4, 512): (1.04, 1.05),
    ("mamba-130m", 8, 2048): (1.00, 1.05),
    ("mamba-1.4b", 4, 512): (1.03, 1.05),
    ("mamba-1.4b", 4, 2048): (1.00, 1.05),
    ("mamba2-130m", 4, 512): (1.06, 1.05),
    ("mamba2-130m", 4, 2048): (1.04, 1.05),
    ("mamba2-1.3b", 4, 512): (1.05, 1.05),
    ("mamba2-1.3b", 4, 2048): (1.02, 1.05),
}
MODEL_SHAPES = tuple(_MODEL_ON_H200)


def of_model(device: str) -> Mapping[tuple[str, int, int], tuple[float, float]]:
    """Return what whole models may take on a ``device`` (its name), by model, batch and length."""
    return _MODEL_ON_H200 if "H200" in device else _MODEL_ON_H100


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
