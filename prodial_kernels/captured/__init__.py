"""Blocks launched as CUDA graphs in anybody's training loop; see :func:`capture`.

Reading order: ``model.py`` (what a user calls), ``chain.py`` (which call is replayed, and which
runs as it is), ``running.py`` (one forward through them), ``deferred.py`` (blocks that share a
graph), ``replay.py`` (one replay in autograd), ``cuda.py`` (the graphs).
"""

from prodial_kernels.captured.chain import CaptureError, CaptureWarning
from prodial_kernels.captured.model import Captured, capture

__all__ = ["CaptureError", "CaptureWarning", "Captured", "capture"]
