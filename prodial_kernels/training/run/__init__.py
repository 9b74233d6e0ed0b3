"""One run: its directory, its state, its loop, and what it reports on the way."""
