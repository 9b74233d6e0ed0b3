"""What a run holds in memory, planned before the weights are loaded."""
