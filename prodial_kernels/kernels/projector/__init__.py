"""The kernels of one adapted projector, and the two passes that launch them in order."""
