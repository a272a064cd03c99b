"""What follows training: load a policy, evaluate it, export it."""
