"""Files: written whole or not at all, locked meanwhile, checked when they are read."""
