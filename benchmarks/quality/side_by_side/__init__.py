"""Many rows trained at once in one model: each run has its own weights and its own examples."""
