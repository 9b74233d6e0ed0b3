"""Modules that hold stored weights besides linear layers: embeddings and mixtures of experts."""
