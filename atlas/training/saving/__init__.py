"""Checkpoints: writing, reading and comparing them."""
