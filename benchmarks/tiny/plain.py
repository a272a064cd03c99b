"""The same training written by hand in plain PyTorch: what Atlas is measured against.

python benchmarks/tiny/plain.py --mark FILE [--mlflow URI]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny
import torch
from torch.nn import functional

BASE_LR, WARMUP, CLIP = 1e-3, 100, 1.0


def optimizer_of(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW without weight decay on the biases."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    undecayed = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=BASE_LR, betas=(0.9, 0.95), weight_decay=0.01, fused=True)


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to 0."""
    if step < WARMUP:
        return BASE_LR * step / WARMUP
    return BASE_LR * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP))) / 2


def train(batch_size: int, steps: int, seed: int = 0) -> Iterator[tuple[float, float]]:
    """One update for each value that is asked for: its loss and its gradient norm."""
    torch.manual_seed(seed)
    inputs, targets = tiny.tensors(seed)
    model = tiny.network()
    optimizer = optimizer_of(model)
    parameters = list(model.parameters())
    step = 0
    while True:
        for index in torch.randperm(len(inputs)).split(batch_size):
            lr = rate(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = functional.mse_loss(model(inputs[index]), targets[index])
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item(), norm.item()
            step += 1


def main() -> None:
    """Two updates, the end of the first one marked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mark", type=Path, required=True)
    parser.add_argument("--mlflow")
    args = parser.parse_args()
    log: Any = tracked(args.mlflow) if args.mlflow else lambda step, loss, norm: None
    for step, (loss, norm) in zip(range(2), train(batch_size=32, steps=1000), strict=False):
        log(step, loss, norm)
        if step == 0:
            tiny.mark(args.mark)


def tracked(uri: str) -> Any:
    """Start a run in MLflow; returns what logs a step."""
    import mlflow

    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("plain")
    mlflow.start_run()
    mlflow.log_params({"lr": BASE_LR, "batch_size": 32, "warmup": WARMUP})
    return lambda step, loss, norm: mlflow.log_metrics({"loss": loss, "norm": norm}, step=step)


if __name__ == "__main__":
    main()
