"""Where the projector plugs in: one file per family of Mamba blocks, plus injection."""
