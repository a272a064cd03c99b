"""How runs are started: here, on this machine's GPUs or through a queue."""
