"""Integer codes with a scale and a zero point for each group: GPTQ, AWQ, HQQ, compressed-tensors.

One storage for all of them (:mod:`.layer`), which their layouts are repacked into (:mod:`.layouts`)
without a change to what a weight stands for.
"""
