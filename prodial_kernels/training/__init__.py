"""Fine-tuning: data, loop, evaluation."""
