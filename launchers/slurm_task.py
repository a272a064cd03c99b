"""A stable name: pickles of jobs that an earlier version queued name `launchers.slurm_task.Task`."""

from launchers.slurm.task import Task

__all__ = ["Task"]
