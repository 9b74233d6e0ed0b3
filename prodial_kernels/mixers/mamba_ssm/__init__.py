"""Mixers of mamba_ssm: ``Mamba``, ``Mamba2``, ``Mamba2Simple`` and ``Mamba3``."""

from prodial_kernels.mixers.mamba_ssm.paths import adapt_mixers, check, recognises

__all__ = ["adapt_mixers", "check", "recognises"]
