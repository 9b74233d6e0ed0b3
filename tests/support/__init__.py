"""What several tests build on: models, stand-ins, runs."""
