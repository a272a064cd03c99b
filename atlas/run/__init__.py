"""One run: its directory, identity, status, lock, signals and failures."""
