"""Which adapters of a target list would take effect in a model, before anything is trained."""
