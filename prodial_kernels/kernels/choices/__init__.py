"""Which tiles, splits and plan a launch takes, from its sizes alone."""
