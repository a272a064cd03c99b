"""Runs on this machine: one rank in this process, several as processes forked from a warm one."""

from launchers.local.launcher import LocalLauncher

__all__ = ["LocalLauncher"]
