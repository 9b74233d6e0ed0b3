"""What a run tells while it goes on: a caller's own code, early stopping, trackers."""
