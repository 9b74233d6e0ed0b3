"""Whole backbones and mixers, adapted and frozen."""
