"""Layers and image operations that several parts use."""
