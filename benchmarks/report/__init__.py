"""Charts and tables of what was measured."""
