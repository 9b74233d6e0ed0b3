"""Measurements: what ProDiaL costs here, against everything one could use instead."""
