"""Vision Mamba, a model to adapt and to test with: :class:`VisionMamba`."""

from prodial_kernels.models.vision_mamba.model import VisionMamba

__all__ = ["VisionMamba"]
