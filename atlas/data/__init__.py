"""Data sets: map-style, so the index of a sample is its id."""
