"""Rounding to fp8, as ``compute="fp8"`` defines it."""
