"""The commands of `atlas`, one file each; the table of them is in `atlas/cli.py`."""
