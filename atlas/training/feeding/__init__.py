"""From a data set to batches: order, workers, prefetching, seeds, cached features."""
