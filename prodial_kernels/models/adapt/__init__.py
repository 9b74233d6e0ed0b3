"""Finding a model's projectors, replacing them by adapted ones, and undoing it."""
