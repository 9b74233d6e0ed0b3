"""Launches of the kernels: cases, recorded launches, compilation without a device."""
