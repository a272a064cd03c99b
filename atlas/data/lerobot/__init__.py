"""A data set of recordings in LeRobot's formats v2.1 and v3.0."""

from atlas.data.lerobot.dataset import LeRobot

__all__ = ["LeRobot"]
