"""`atlas/train.py --config FILE [overrides]`: the command line of one file instead of groups.

torchrun --nproc_per_node=8 atlas/train.py --config atlas/configs/train_config.yaml
"""

import sys
from pathlib import Path

# Run by path, Python puts this folder first, where modules are named like the standard library's.
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
