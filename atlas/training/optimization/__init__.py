"""From gradients to new weights: optimizer, clipping, EMA, precision."""
