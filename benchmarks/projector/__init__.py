"""One projector: its shapes, its rivals, and what is measured of each."""
