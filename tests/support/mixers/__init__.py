"""Stand-ins for mixers and for the kernels that upstream needs a GPU for."""
