"""What is computed, independent of how: definition, backward, mathematics."""
