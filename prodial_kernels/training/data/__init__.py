"""From rows of data to batches of tokens."""
