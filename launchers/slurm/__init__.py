"""Runs on a Slurm cluster, submitted through submitit."""

from launchers.slurm.launcher import SlurmLauncher

__all__ = ["SlurmLauncher"]
