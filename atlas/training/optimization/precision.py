"""The precision that a run computes in, and whether it computes the same twice."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch

from atlas.errors import ConfigError


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context that a forward pass runs in; also sets how float32 products are taken."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def check_precision(precision: str, device: torch.device) -> None:
    """Raise `ConfigError` where `device` cannot compute in `precision`."""
    if precision == "fp32":
        return
    capable = device.type == "cpu" or torch.cuda.get_device_capability(device)[0] >= 8
    if precision == "bf16" and not capable:
        raise ConfigError(
            f"trainer.precision=bf16 and {torch.cuda.get_device_name(device)} has no bf16; use fp32"
        )
    if precision == "tf32" and (device.type == "cpu" or not capable):
        raise ConfigError(f"trainer.precision=tf32 and {device.type} has no TF32; use fp32 or bf16")


def set_determinism(wanted: bool) -> None:
    """Only deterministic kernels, where `trainer.deterministic` asks for it."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if wanted != torch.are_deterministic_algorithms_enabled():  # asking is cheap, setting is not
        torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.benchmark = not wanted
