"""Operators that multiply by a weight as it is stored."""
