"""Recordings in LeRobot's formats v2.1 and v3.0 as a data set."""

from atlas.data.lerobot.dataset import LeRobot

__all__ = ["LeRobot"]
