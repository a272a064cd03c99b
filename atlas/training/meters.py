"""What a logged step is told by: its speed, and values that are still on their way from the device."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from atlas.training.optimization.gradient import as_tensor


@dataclass
class Window:
    """Time and steps since the last logged step, for the metrics of speed."""

    began: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    steps: int = 0

    def metrics(self, samples_per_step: int) -> dict[str, float]:
        """Samples a second, milliseconds a step, and the share of time spent waiting for data."""
        took = max(time.perf_counter() - self.began, 1e-9)
        return {
            "samples_per_s": samples_per_step * self.steps / took,
            "step_time_ms": 1000.0 * took / max(1, self.steps),
            "data_wait_share": self.waited / took,
        }


class Pending:
    """A logged step whose values are on their way from the device."""

    def __init__(
        self, step: int, values: Mapping[str, Any], device: torch.device, other: dict[str, float]
    ) -> None:
        self.step = step
        self._other = other
        self._names = list(values)
        self._event: torch.cuda.Event | None = None
        if device.type == "cpu":
            self._packed: Any = [float(value) for value in values.values()]
            return
        packed = torch.stack([as_tensor(value, device) for value in values.values()])
        self._packed = torch.empty(packed.shape, pin_memory=True)
        self._packed.copy_(packed, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def metrics(self) -> dict[str, float]:
        """The values as numbers; waits for the device only where the next step has not begun."""
        if self._event is not None:
            self._event.synchronize()
            self._packed = self._packed.tolist()
        return {**dict(zip(self._names, self._packed, strict=True)), **self._other}
