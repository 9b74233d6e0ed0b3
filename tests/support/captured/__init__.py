"""Blocks as CUDA graphs: a stand-in without a device, models, and a capture on one."""
