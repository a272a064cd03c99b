"""Demonstrations that are held in memory: what the data sets have in common that simulate them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atlas.errors import ConfigError
from atlas.system.files import digest

BLOCK = 1024  # frames in a stretch of images or samples

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Pixels = NDArray[np.uint8]
Batch = dict[str, Any]
Policy = Callable[[Batch], Tensor]


class Demonstrations:
    """Episodes one after the other; a sample is a frame and the next `horizon` actions.

    To be set by who builds on it, with a row a frame and an entry an episode.
    """

    images: Pixels  # [N, V, 3, H, W]
    states: Floats  # [N, S]
    actions: Floats  # [N, A]
    episode: Ints  # [N], the episode that each frame is of
    ends: Ints  # [E], one past the last frame of each episode
    instructions: list[str]  # [E]
    horizon: int
    spec: dict[str, Any]

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: int) -> Batch:
        """One sample: images uint8 [V, 3, H, W], state [1, S], instruction, actions [T, A],
        action_mask [T], False past the episode's end."""
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
    ) -> Batch:
        """The samples of these ids, collated; without `images` where they are not wanted.

        Images are augmented by one seed a sample, if at all.
        """
        batch = self._gather(np.asarray(ids, np.int64), images)
        if images and seeds is not None and self.augments:
            augmented = self._augmented(batch["images"].numpy(), np.asarray(seeds))
            batch["images"] = torch.from_numpy(augmented)
        return batch

    @property
    def augments(self) -> bool:
        """Whether a sample's images depend on its seed, by `_augmented`."""
        return False

    def _augmented(self, images: Pixels, seeds: Ints) -> Pixels:
        """Images [B, V, 3, H, W], each a function of what it was and of its seed of [B]."""
        raise NotImplementedError

    def image_blocks(self) -> list[tuple[str, int]]:
        """For each stretch of frames: what tells its pixels from all others, and their number."""
        starts = range(0, len(self), BLOCK)
        blocks = [self.images[start : start + BLOCK] for start in starts]
        return [(digest(block.tobytes()), len(block)) for block in blocks]

    def block_images(self, block: int, start: int, stop: int) -> Tensor:
        """uint8 [stop - start, V, 3, H, W], frames of one of `image_blocks`."""
        return torch.from_numpy(self.images[block * BLOCK + start : block * BLOCK + stop])

    def image_places(self, ids: Sequence[int] | Ints) -> tuple[Ints, Ints]:
        """The block and the frame in it of each sample's images, [B] and [B]."""
        return np.divmod(np.asarray(ids, np.int64), BLOCK)

    def blocks(self) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
        """State [B, 1, S], actions [B, T, A] and mask [B, T] of all samples, BLOCK at a time."""
        for start in range(0, len(self), BLOCK):
            batch = self._gather(np.arange(start, min(start + BLOCK, len(self))), images=False)
            yield batch["state"].numpy(), batch["actions"].numpy(), batch["action_mask"].numpy()

    def baselines(self, train: Demonstrations) -> dict[str, float]:
        """L1 over this split's valid actions, in their own units, without a model."""
        mean = train.actions.astype(np.float64).mean(axis=0).astype(np.float32)
        batch = self._gather(np.arange(len(self)), images=False)
        errors = np.abs(batch["actions"].numpy() - mean)[batch["action_mask"].numpy()]
        return {"mean_action": float(errors.mean(dtype=np.float64))}

    def _gather(self, ids: Ints, images: bool = True) -> Batch:
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


def check(split: str, **counts: int) -> None:
    """Raise `ConfigError` for another split than train and val, and for `data.<name>` below 1."""
    if split not in ("train", "val"):
        raise ConfigError(f"data split={split!r} is unknown: use 'train' or 'val'")
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"data.{name}={count} must be at least 1")


def moments(values: Floats) -> dict[str, list[float]]:
    """Mean and standard deviation of each column."""
    exact = values.astype(np.float64)
    return {"mean": exact.mean(axis=0).tolist(), "std": exact.std(axis=0).tolist()}
