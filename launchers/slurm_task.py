"""The dotted name that jobs hold which an earlier version queued: their pickles name it."""

from launchers.slurm.task import Task

__all__ = ["Task"]
