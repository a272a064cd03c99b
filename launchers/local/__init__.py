"""Runs on this machine, in the foreground."""

from launchers.local.launcher import LocalLauncher

__all__ = ["LocalLauncher"]
