"""What a run begins with that the configuration does not name, or that names its settings."""
