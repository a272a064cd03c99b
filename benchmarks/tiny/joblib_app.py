"""The sweep's job as a script with Hydra's joblib launcher: what a person writes without Atlas."""

from __future__ import annotations

import time

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path=None, config_name="job")
def main(cfg: DictConfig) -> float:
    """Train the tiny MLP for as many steps, waiting as long in each."""
    import plain

    losses = []
    steps = plain.train(32, cfg.steps, cfg.seed)
    for _, (loss, _norm) in zip(range(cfg.steps), steps, strict=False):
        losses.append(loss)
        time.sleep(cfg.pause)
    return losses[-1]


if __name__ == "__main__":
    from hydra.core.config_store import ConfigStore

    job = {"steps": 20, "pause": 0.05, "seed": 0}
    ConfigStore.instance().store("job", job)
    main()
