"""What this package knows of other people's models."""
