"""What is checked and estimated with the model in hand before a run starts."""
