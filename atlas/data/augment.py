"""Random crops and colours for camera images, as a function of one seed a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from atlas.errors import ConfigError

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601
DRAWS = 6  # random numbers a view


@dataclass(frozen=True)
class Augment:
    """What is done to a view at random, in every sample anew and for every camera by itself.

    crop: the share of height and width that is cut away, somewhere around the image; what is left
    is scaled back. colour: brightness, contrast and saturation are multiplied by 1 - colour to
    1 + colour. except_for: cameras with one of these words in their name are left as they are: a
    wrist camera moves with the hand, and where things are in its image is what it is for.
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
        """Whether there is anything to do."""
        return bool(self.crop or self.colour)

    def views(self, cameras: Sequence[str]) -> list[int]:
        """The numbers of those `cameras` whose images are changed."""
        spared = [word.lower() for word in self.except_for]
        return [v for v, name in enumerate(cameras) if not any(w in name.lower() for w in spared)]

    def __call__(self, images: Tensor, cameras: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """uint8 [B, V, 3, H, W], changed; each sample by its seed alone, whatever the batch."""
        views = self.views(cameras)
        if not self.changes or not views:
            return images
        random = torch.from_numpy(uniform(seeds, len(cameras) * DRAWS)).float()
        random = random.view(len(images), len(cameras), DRAWS)[:, views].flatten(0, 1)
        pixels = images[:, views].flatten(0, 1).float()
        if self.crop:
            pixels = self._cropped(pixels, random[:, :2])
        if self.colour:
            pixels = self._coloured(pixels, random[:, 2:5])
        changed = images.clone()
        shape = (len(images), len(views), *images.shape[2:])
        changed[:, views] = pixels.round().clamp(0, 255).to(torch.uint8).view(shape)
        return changed

    def _cropped(self, pixels: Tensor, random: Tensor) -> Tensor:
        scale = 1.0 - self.crop
        # In the units of a grid the image spans -1 to 1, so the window may move by 1 - scale.
        moves = (2 * random - 1) * (1 - scale)
        window = torch.zeros(len(pixels), 2, 3)
        window[:, 0, 0] = window[:, 1, 1] = scale
        window[:, :, 2] = moves
        grid = F.affine_grid(window, list(pixels.shape), align_corners=False)
        return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)

    def _coloured(self, pixels: Tensor, random: Tensor) -> Tensor:
        factors = 1 + self.colour * (2 * random - 1)
        brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
        pixels = pixels * brightness
        weights = torch.tensor(GREY).view(1, 3, 1, 1)
        mean = (pixels * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
        pixels = mean + contrast * (pixels - mean)
        grey = (pixels * weights).sum(1, keepdim=True)
        return grey + saturation * (pixels - grey)


def uniform(seeds: Sequence[int] | NDArray[Any], count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) for each seed, [B, count]."""
    mixed = splitmix(np.asarray(seeds).astype(np.uint64))
    lanes = np.arange(count, dtype=np.uint64)
    draws: NDArray[np.float64] = (splitmix(mixed[:, None] + lanes) >> np.uint64(11)) / 2.0**53
    return draws


def splitmix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 (Steele et al. 2014): a generator a sample would cost more than the batch."""
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
