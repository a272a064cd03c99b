"""Fusion: vision, language and the robot's state in one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LanguageQueriedSoftmax(nn.Module):
    """Attention from the instruction to the patches of each camera, then an MLP.

    The instruction gives `points` queries, which are compared with every patch. The softmax over a
    camera's patches gives an expected position in the image (a spatial softmax, Levine et al. 2016)
    and a mean of the patches' values. These, the language and the state are the input of the MLP.
    """

    places: Tensor  # [P, 2]

    def __init__(
        self,
        cameras: int,
        grid: tuple[int, int],
        vision_width: int,
        language_width: int,
        state_width: int,
        width: int = 256,
        points: int = 4,
        key_width: int = 64,
        value_width: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.width, self.points = width, points
        self.query = nn.Linear(language_width, points * key_width)
        self.patch = nn.Sequential(
            nn.Linear(vision_width, 2 * key_width),
            nn.GELU(),
            nn.Linear(2 * key_width, key_width + value_width),
        )
        self.sizes = (key_width, value_width)
        self.camera_embedding = nn.Parameter(torch.randn(cameras, 1, key_width) * 0.02)
        self.register_buffer("places", _places(grid), persistent=False)
        attended = cameras * points * (2 + value_width)
        self.mix = nn.Sequential(
            nn.Linear(attended + language_width + state_width, width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Dropout(dropout),
        )

    def forward(self, patches: Tensor, language: Tensor, state: Tensor) -> Tensor:
        """Return [B, width] for patches [B, V, P, .], language [B, .] and state [B, .]."""
        keys, values = self.patch(patches).split(self.sizes, dim=-1)
        keys = keys + self.camera_embedding
        query = self.query(language).view(len(language), 1, self.points, -1)
        scores = query @ keys.transpose(-1, -2) * self.sizes[0] ** -0.5
        weights = scores.softmax(dim=-1)  # [B, V, points, P]
        attended = weights @ torch.cat(
            [self.places.to(values.dtype).expand(*values.shape[:2], -1, -1), values], dim=-1
        )
        mixed: Tensor = self.mix(torch.cat([attended.flatten(1), language, state], dim=-1))
        return mixed


def _places(grid: tuple[int, int]) -> Tensor:
    """Return the centres of the patches, row by row, [P, 2]; the image spans -1 to 1."""
    rows, columns = (torch.arange(n) * 2.0 / n + 1.0 / n - 1.0 for n in grid)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
