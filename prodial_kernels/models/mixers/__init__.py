"""One file per family of mixers: how its forward comes to use adapted projectors."""
