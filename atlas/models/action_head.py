"""Chunks of actions, and how far they are from the demonstrated ones."""

from __future__ import annotations

from torch import Tensor, nn


class ChunkHead(nn.Module):
    """All `horizon` actions of a chunk at once, in normalised units, trained by L1."""

    def __init__(
        self, width: int, horizon: int, action_dim: int, hidden: int = 256, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.shape = (horizon, action_dim)
        self.layers = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, horizon * action_dim),
        )

    def forward(self, features: Tensor) -> Tensor:
        """features [B, width]; returns [B, T, A]."""
        actions: Tensor = self.layers(features)
        return actions.view(-1, *self.shape)

    def errors(self, predicted: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
        """[B, T, A] absolute errors in float32, exactly 0 where `mask` [B, T] is False."""
        errors = predicted.float() - actions.float()
        # Before the absolute value, so that whatever stands in the padding has no gradient either.
        return errors.masked_fill(~mask[..., None], 0.0).abs()
