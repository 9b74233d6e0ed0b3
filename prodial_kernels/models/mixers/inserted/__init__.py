"""Learned tokens between a mixer's projection and its scan: affix-tuning."""
