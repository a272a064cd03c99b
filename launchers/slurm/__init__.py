"""Runs as jobs in Slurm's queue."""

from launchers.slurm.launcher import SlurmLauncher

__all__ = ["SlurmLauncher"]
