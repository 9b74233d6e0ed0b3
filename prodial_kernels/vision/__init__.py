"""Vision Mamba, a model to adapt and to test with: :class:`VisionMamba`."""

from prodial_kernels.vision.model import VisionMamba

__all__ = ["VisionMamba"]
