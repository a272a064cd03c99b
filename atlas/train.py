"""`atlas/train.py --config FILE [overrides]`: one file of values instead of groups.

torchrun --nproc_per_node=8 atlas/train.py --config atlas/configs/train_config.yaml
"""

import sys
from pathlib import Path

# For a script, Python puts its folder first: atlas/, whose modules would hide others of their name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import hydra
from omegaconf import DictConfig

from launchers.launch import launch, start


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Compose the configuration and launch its run."""
    launch(cfg)


if __name__ == "__main__":
    start(main, takes_file=True)
