"""The transformer block of the encoders."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from atlas.errors import ConfigError


class Block(nn.Module):
    """Attention and an MLP, each after a layer norm and with a residual connection (pre-norm).

    The policy has no batch norm anywhere: the gradient must not depend on how the batch is
    divided into micro-batches and ranks.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(
                f"model: heads={heads} does not divide width={width}; set a divisor of the width"
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
        """Return tokens [B, L, width] for tokens [B, L, width].

        `valid` [B, L] is False for padding, which is not attended to; None is all True.
        """
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
