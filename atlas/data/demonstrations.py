"""Demonstrations held in memory: the common part of the simulated data sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atlas.data.arrays import Floats, Ints, Pixels
from atlas.data.baselines import Vectors
from atlas.errors import ConfigError
from atlas.system.files import digest

FRAMES = 1024  # frames in a block of images, and samples in a batch of `blocks`


class Demonstrations:
    """Concatenated episodes; a sample is a frame and the next `horizon` actions.

    A subclass sets the attributes: N frames, E episodes, V cameras.
    """

    images: Pixels  # [N, V, 3, H, W]
    states: Floats  # [N, S]
    actions: Floats  # [N, A]
    episode: Ints  # [N], index of the episode that each frame belongs to
    ends: Ints  # [E], one past the last frame of each episode
    instructions: list[str]  # [E]
    horizon: int
    spec: dict[str, Any]

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return sample `index`.

        `images` uint8 [V, 3, H, W], `state` [1, S], `instruction`, `actions` [T, A] and
        `action_mask` [T], False past the episode's end.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        batch = self._gather(np.array([index % len(self)]))
        return {key: value[0] for key, value in batch.items()}

    def batch(
        self,
        ids: Sequence[int] | Ints,
        seeds: Sequence[int] | Ints | None = None,
        *,
        images: bool = True,
    ) -> dict[str, Any]:
        """Return the collated batch of the samples `ids`; with images=False without `images`.

        `seeds`: one seed a sample for random augmentation, if the data set augments.
        """
        batch = self._gather(np.asarray(ids, np.int64), images)
        if images and seeds is not None and self.augments:
            augmented = self._augment(batch["images"].numpy(), np.asarray(seeds))
            batch["images"] = torch.from_numpy(augmented)
        return batch

    @property
    def augments(self) -> bool:
        """Whether a sample's images depend on its seed."""
        return False

    def _augment(self, images: Pixels, seeds: Ints) -> Pixels:
        """Return changed copies of images [B, V, 3, H, W], each determined by its seed of [B]."""
        raise NotImplementedError

    def image_blocks(self) -> list[tuple[str, int]]:
        """Return a digest of the pixels and the number of frames of every block."""
        starts = range(0, len(self), FRAMES)
        blocks = [self.images[start : start + FRAMES] for start in starts]
        return [(digest(block.tobytes()), len(block)) for block in blocks]

    def block_images(self, block: int, start: int, stop: int) -> Tensor:
        """Return frames `start` to `stop` of a block, uint8 [stop - start, V, 3, H, W]."""
        return torch.from_numpy(self.images[block * FRAMES + start : block * FRAMES + stop])

    def image_places(self, ids: Sequence[int] | Ints) -> tuple[Ints, Ints]:
        """Return the block and the frame inside it of each sample's images, [B] each."""
        return np.divmod(np.asarray(ids, np.int64), FRAMES)

    def blocks(self) -> Iterator[Vectors]:
        """Yield `state` [B, 1, S], `actions` [B, T, A] and `action_mask` [B, T] of all samples."""
        for start in range(0, len(self), FRAMES):
            ids = np.arange(start, min(start + FRAMES, len(self)))
            batch = self._gather(ids, images=False)
            yield batch["state"].numpy(), batch["actions"].numpy(), batch["action_mask"].numpy()

    def baselines(self, train: Demonstrations) -> dict[str, float]:
        """Return the L1 error of the mean action of `train` over this split's valid actions."""
        mean = train.actions.astype(np.float64).mean(axis=0).astype(np.float32)
        batch = self._gather(np.arange(len(self)), images=False)
        errors = np.abs(batch["actions"].numpy() - mean)[batch["action_mask"].numpy()]
        return {"mean_action": float(errors.mean(dtype=np.float64))}

    def _gather(self, ids: Ints, images: bool = True) -> dict[str, Any]:
        ends = self.ends[self.episode[ids]]
        steps = ids[:, None] + np.arange(self.horizon)
        mask = steps < ends[:, None]
        chunks = self.actions[np.minimum(steps, ends[:, None] - 1)] * mask[..., None]
        pixels = {"images": torch.from_numpy(self.images[ids])} if images else {}
        return {
            **pixels,
            "state": torch.from_numpy(self.states[ids][:, None]),
            "instruction": [self.instructions[e] for e in self.episode[ids]],
            "actions": torch.from_numpy(chunks.astype(np.float32)),
            "action_mask": torch.from_numpy(mask),
        }


def check_split(split: str, **counts: int) -> None:
    """Raise `ConfigError` if `split` is neither train nor val, or a `data.<name>` is below 1."""
    if split not in ("train", "val"):
        raise ConfigError(f"data split={split!r} is unknown: use 'train' or 'val'")
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"data.{name}={count} must be at least 1")


def moments(values: Floats) -> dict[str, list[float]]:
    """Return mean and standard deviation of each column."""
    exact = values.astype(np.float64)
    return {"mean": exact.mean(axis=0).tolist(), "std": exact.std(axis=0).tolist()}
