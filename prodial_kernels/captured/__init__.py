"""The blocks of a model as CUDA graphs, in anybody's training loop; see :func:`capture`.

A *block* is an element of the model's ``nn.ModuleList`` of layers; a *section* is one block, or
several consecutive ones, captured as one graph. Reading order: ``model.py`` (the public function),
``chain.py`` (which call is replayed and which runs eagerly), ``program.py`` (what was recorded and
captured for one shape), ``running.py`` (one forward through the blocks), ``deferred.py`` (blocks
that share a graph), ``replay.py`` (one replay as a node of autograd), ``cuda.py`` (the graphs),
``leaves.py`` (what they read instead of parameters).
"""

from prodial_kernels.captured.chain import CaptureError, CaptureWarning
from prodial_kernels.captured.model import Captured, capture

__all__ = ["CaptureError", "CaptureWarning", "Captured", "capture"]
