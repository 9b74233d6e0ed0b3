"""The blocks around the mixers: norms, recomputation, the head, blocks kept on the host."""
