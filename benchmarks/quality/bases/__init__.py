"""The study's base models: their shapes, the text and images they see, and their pretraining."""
