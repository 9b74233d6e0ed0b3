"""Models read from a directory or the hub, dense or quantised, checked for completeness."""
