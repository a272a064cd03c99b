"""Several ranks as one: process groups, agreement, replicas, sharding."""
