"""Random crops and colours of camera images, determined by one seed for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from atlas.data.arrays import Array
from atlas.errors import ConfigError

GREY = (0.299, 0.587, 0.114)  # weights of red, green and blue in a grey value, ITU-R BT.601
DRAWS = 6  # random numbers for each view


@dataclass(frozen=True)
class Augment:
    """Random changes of images, drawn independently for every sample and camera.

    crop: the fraction of height and width that is cut off at random sides; the rest is resized to
    the original size. colour: brightness, contrast and saturation are multiplied by factors from
    1 - colour to 1 + colour. except_for: cameras with one of these words in their name are not
    changed. A wrist camera moves with the hand, so positions in its image carry information that a
    crop would destroy.
    """

    crop: float = 0.0
    colour: float = 0.0
    except_for: Sequence[str] = field(default=("wrist", "hand", "gripper"))

    def __post_init__(self) -> None:
        problems = []
        for key, value, below in (("crop", self.crop, 0.9), ("colour", self.colour, 1.0)):
            if not isinstance(value, int | float) or not 0 <= value < below:
                problems.append(f"data.augment.{key}={value} must be from 0 (off) to below {below}")
        if isinstance(self.except_for, str):
            problems.append(
                f"data.augment.except_for={self.except_for} must be a list, as [{self.except_for}]"
            )
        if problems:
            raise ConfigError(problems)

    @property
    def changes(self) -> bool:
        """Whether any change is configured."""
        return bool(self.crop or self.colour)

    def views(self, cameras: Sequence[str]) -> list[int]:
        """Return the indices of the `cameras` whose images are changed."""
        words = [word.lower() for word in self.except_for]
        return [v for v, name in enumerate(cameras) if not any(w in name.lower() for w in words)]

    def __call__(self, images: Tensor, cameras: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Return changed copies of `images`, uint8 [B, V, 3, H, W].

        The change of a sample depends on its seed only, not on the rest of the batch.
        """
        views = self.views(cameras)
        if not self.changes or not views:
            return images
        random = torch.from_numpy(uniform(seeds, len(cameras) * DRAWS)).float()
        random = random.view(len(images), len(cameras), DRAWS)[:, views].flatten(0, 1)
        pixels = images[:, views].flatten(0, 1).float()
        if self.crop:
            pixels = self._crop(pixels, random[:, :2])
        if self.colour:
            pixels = self._change_colours(pixels, random[:, 2:5])
        changed = images.clone()
        shape = (len(images), len(views), *images.shape[2:])
        changed[:, views] = pixels.round().clamp(0, 255).to(torch.uint8).view(shape)
        return changed

    def _crop(self, pixels: Tensor, random: Tensor) -> Tensor:
        scale = 1.0 - self.crop
        # In grid coordinates the image spans -1 to 1, so the window can move by ±(1 - scale).
        offsets = (2 * random - 1) * (1 - scale)
        window = torch.zeros(len(pixels), 2, 3)
        window[:, 0, 0] = window[:, 1, 1] = scale
        window[:, :, 2] = offsets
        grid = F.affine_grid(window, list(pixels.shape), align_corners=False)
        return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)

    def _change_colours(self, pixels: Tensor, random: Tensor) -> Tensor:
        factors = 1 + self.colour * (2 * random - 1)
        brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
        pixels = pixels * brightness
        weights = torch.tensor(GREY).view(1, 3, 1, 1)
        mean = (pixels * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
        pixels = mean + contrast * (pixels - mean)
        grey = (pixels * weights).sum(1, keepdim=True)
        return grey + saturation * (pixels - grey)


def uniform(seeds: Sequence[int] | Array, count: int) -> Array:
    """Return `count` random numbers in [0, 1) for each of B seeds, float64 [B, count]."""
    mixed = splitmix(np.asarray(seeds).astype(np.uint64))
    lanes = np.arange(count, dtype=np.uint64)
    draws: Array = (splitmix(mixed[:, None] + lanes) >> np.uint64(11)) / 2.0**53
    return draws


def splitmix(numbers: Array) -> Array:
    """Return uint64 `numbers` mixed by SplitMix64 (Steele et al. 2014).

    It works on whole arrays. To create a numpy generator for each sample would take longer than to
    read the batch.
    """
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
