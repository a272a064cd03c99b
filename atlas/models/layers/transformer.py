"""The transformer block that the encoders are built of."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from atlas.errors import ConfigError


class Block(nn.Module):
    """Attention and a perceptron, each normalised before and added to its input (pre-norm).

    No batch norm anywhere in the policy: a gradient must not depend on how a batch is cut.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(
                f"model: heads={heads} does not divide width={width}; choose a divisor"
            )
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """tokens [B, L, width]; valid [B, L], False where a token is padding to be ignored."""
        tokens = tokens + self.dropout(self._attend(self.norm_attention(tokens), valid))
        tokens = tokens + self.dropout(self.mlp(self.norm_mlp(tokens)))
        return tokens

    def _attend(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        batch, length, width = tokens.shape
        qkv = self.qkv(tokens).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mask = None if valid is None else valid[:, None, None, :]
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=mask)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return out
