"""The robot policy and its parts."""
