"""The study's tasks: how each is made from packages, stored, split and read."""
