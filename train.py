"""Atlas: one command line becomes one reproducible training run.

python train.py optim.lr=2.8e-4 schedule.warmup=1000
python train.py --help
"""

import hydra
from omegaconf import DictConfig

from launchers.launch import launch, start


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Compose the configuration and launch its run."""
    launch(cfg)


if __name__ == "__main__":
    start(main)
