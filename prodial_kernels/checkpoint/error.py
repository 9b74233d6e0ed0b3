"""The one exception of saved adapters."""


class AdapterError(ValueError):
    """An adapter cannot be saved or loaded: damaged, of another version, or of another model."""
