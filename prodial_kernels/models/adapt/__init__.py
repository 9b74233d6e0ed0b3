"""Finding a model's projectors, replacing them with adapted ones, and taking that back."""
