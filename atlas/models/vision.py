"""Vision encoders: their base class, and a small vision transformer with register tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atlas.errors import ConfigError
from atlas.models.layers.transformer import Block


class VisionEncoder(nn.Module):
    """Base of the vision encoders: from views of a scene to a feature for each patch.

    `forward` takes uint8 images [B, V, 3, H, W] and returns [B, V, P, width], the patches row by
    row. `grid`: rows and columns of a view's patches, P = rows x columns. See
    `atlas.models.protocol.Vision` and `Encodes`.
    """

    grid: tuple[int, int]
    width: int

    def encode(self, images: Tensor) -> Tensor:
        """Return the same as `forward`; the feature cache calls this method."""
        features: Tensor = self(images)
        return features

    def fingerprint(self) -> dict[str, Any]:
        """Return plain values that, together with the weights, determine what `encode` returns.

        `views` says whether a view's features depend on the other views and on their order.
        """
        raise NotImplementedError


class VisionTransformer(VisionEncoder):
    """A vision transformer: a feature for each patch; each image is encoded independently.

    image_size: [H, W] of the data set's images. resize: [H, W] that all images are resized to;
    None is `image_size`. Both sides must be divisible by `patch`.
    Register tokens (Darcet et al. 2024) take part in attention and are then dropped: they store
    information that belongs to no patch.
    """

    def __init__(
        self,
        image_size: Sequence[int],
        resize: Sequence[int] | None = None,
        patch: int = 7,
        width: int = 96,
        depth: int = 1,
        heads: int = 4,
        registers: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        rows, columns = (int(pixels) for pixels in resize or image_size)
        if rows % patch or columns % patch:
            raise ConfigError(
                f"model.vision.patch={patch} does not divide images of {rows}x{columns} pixels; "
                "set a divisor, or set model.vision.resize to multiples of it"
            )
        self.image_size, self.width = (rows, columns), width
        self.grid = (rows // patch, columns // patch)
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.register_tokens = nn.Parameter(torch.randn(registers, width) * 0.02)
        self.position_embedding = nn.Parameter(
            torch.randn(self.grid[0] * self.grid[1], width) * 0.02
        )
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """Return features [..., P, width] of uint8 images [..., 3, H, W]."""
        pixels = images.flatten(0, -4).to(self.position_embedding.dtype) / 127.5 - 1.0
        if pixels.shape[-2:] != self.image_size:
            pixels = F.interpolate(pixels, self.image_size, mode="bilinear", antialias=True)
        patches = self.embed(pixels).flatten(2).transpose(1, 2) + self.position_embedding
        registers = self.register_tokens.expand(len(patches), -1, -1)
        tokens = torch.cat([registers.to(patches.dtype), patches], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        features: Tensor = self.norm(tokens[:, len(self.register_tokens) :])
        return features.unflatten(0, images.shape[:-3])

    def fingerprint(self) -> dict[str, Any]:
        """Return what the shapes of the weights do not determine."""
        return {
            "encoder": "VisionTransformer",
            "image_size": list(self.image_size),
            "grid": list(self.grid),
            "heads": [block.heads for block in self.blocks],
            "views": "each by itself",
            "dtype": str(self.position_embedding.dtype),
            "preprocessing": "bilinear with antialiasing, -1 to 1",
        }
