"""Data sets: map-style, the index of a sample is its id."""
