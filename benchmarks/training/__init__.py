"""Fine-tuning jobs: their steps, curves and table."""
