"""Rows of the study: what one is, how it is trained and scored, and how many are run."""
