"""Child processes, timing, memory and stored rows: what every benchmark measures with."""
