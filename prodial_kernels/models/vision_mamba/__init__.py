"""Vision Mamba, an image classifier to adapt: :class:`VisionMamba`."""

from prodial_kernels.models.vision_mamba.model import VisionMamba

__all__ = ["VisionMamba"]
