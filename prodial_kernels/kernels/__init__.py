"""How it is computed, in Triton. Imported only when an operation runs on a GPU."""
