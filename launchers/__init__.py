"""Starting runs: on this machine, under torchrun, or through Slurm's queue."""
