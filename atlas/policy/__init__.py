"""After training: load, evaluate and export a policy."""
