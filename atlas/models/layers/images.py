"""Image operations of pretrained vision encoders: scaled pixels and pooled patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atlas.errors import ConfigError

# Mean and standard deviation of ImageNet's red, green and blue pixels, scaled to 0 to 1.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def scaled(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return uint8 images [N, 3, H, W] as float32 from 0 to 1, resized to [N, 3, *size]."""
    pixels = images.float() / 255.0
    if pixels.shape[-2:] == size:
        return pixels
    # Antialiased bilinear interpolation does not overshoot, so the result is within 0 to 1 too.
    return F.interpolate(pixels, size, mode="bilinear", antialias=True)


def whole_patches(
    image_size: Sequence[int], resize: Sequence[int] | None, patch: int
) -> tuple[int, int]:
    """Return the [H, W] to resize images to; raise `ConfigError` unless `patch` divides both."""
    rows, columns = (int(pixels) for pixels in resize or image_size)
    if rows % patch or columns % patch:
        near = [max(1, round(n / patch)) * patch for n in (rows, columns)]
        raise ConfigError(
            f"the encoder's patches of {patch} pixels do not divide images of {rows}x{columns}; "
            f"set model.vision.resize to multiples of {patch}, for example {near}"
        )
    return rows, columns


class GridPool(nn.Module):
    """Averages patches [N, rows * columns, C] over the cells of a coarser grid.

    It is a matrix product instead of torch's adaptive pooling, whose gradient is not deterministic
    on CUDA. As in torch, cells overlap if the sizes are not multiples.
    """

    weights: Tensor  # [cells, patches]

    def __init__(self, patches: tuple[int, int], grid: Sequence[int] | None) -> None:
        super().__init__()
        rows, columns = (int(n) for n in grid or patches)
        if not (1 <= rows <= patches[0] and 1 <= columns <= patches[1]):
            raise ConfigError(
                f"model.vision.grid={[rows, columns]} must be from [1, 1] to the {list(patches)} "
                "patches of an image; null keeps them all"
            )
        self.grid, self.pools = (rows, columns), (rows, columns) != patches
        weights = torch.kron(_averages(patches[0], rows), _averages(patches[1], columns))
        self.register_buffer("weights", weights if self.pools else None, persistent=False)

    def forward(self, patches: Tensor) -> Tensor:
        """Return float32 [N, cells, C]."""
        patches = patches.float()
        if not self.pools:
            return patches
        with torch.autocast(patches.device.type, enabled=False):
            return self.weights @ patches


def _averages(patches: int, cells: int) -> Tensor:
    """Return the weights of the mean over each cell's patches along one side, [cells, patches]."""
    weights = torch.zeros(cells, patches)
    for cell in range(cells):
        first, end = cell * patches // cells, -(-(cell + 1) * patches // cells)
        weights[cell, first:end] = 1.0 / (end - first)
    return weights
