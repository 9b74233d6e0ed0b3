"""Weights as other libraries store them, and what a stored weight must keep."""
