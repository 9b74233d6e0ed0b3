"""One optimiser step: its loss, its launches, its optimiser."""
