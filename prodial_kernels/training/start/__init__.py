"""What a run begins with: objects in the place of names, settings and values, where drawn."""
