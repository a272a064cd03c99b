"""Instructions to vectors: a small transformer over a vocabulary of words."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from atlas.models.layers.transformer import Block

PAD, UNKNOWN, START = "<pad>", "<unk>", "<start>"


class WordEncoder(nn.Module):
    """A vector for each instruction, read off at a start token, which an empty one has too.

    vocabulary: words that get an embedding of their own; any other word is `<unk>`.
    length: tokens of the longest instruction, the start token included; what is longer loses its
    end. Batches are padded to a multiple of 8 tokens, so that their shapes are few.
    """

    untraced = ("tokenize",)  # Python on text: nothing to compile in it

    def __init__(
        self,
        vocabulary: Iterable[str],
        width: int = 96,
        depth: int = 2,
        heads: int = 4,
        length: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.width, self.length = width, length
        words = [PAD, UNKNOWN, START, *vocabulary]
        self.ids = {word: number for number, word in enumerate(words)}
        self.embed = nn.Embedding(len(words), width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self._known: dict[str, list[int]] = {}

    def tokenize(self, texts: list[str]) -> Tensor:
        """[B, L] int64 on the module's device: a start token, the words, padding."""
        rows = [self._known.get(text) or self._row(text) for text in texts]
        longest = min(-(-max(map(len, rows)) // 8) * 8, self.length)
        rows = [row + [self.ids[PAD]] * (longest - len(row)) for row in rows]
        # Not waited for: the copy of a few integers must not hold up the host.
        return torch.tensor(rows).to(self.embed.weight.device, non_blocking=True)

    def _row(self, text: str) -> list[int]:
        words = [START, *re.findall(r"[^\W_]+", text.lower())][: self.length]
        row = [self.ids.get(word, self.ids[UNKNOWN]) for word in words]
        self._known[text] = row
        return row

    def forward(self, texts: list[str]) -> Tensor:
        """[B, width], one vector for each of the B instructions."""
        ids = self.tokenize(texts)
        tokens = self.embed(ids) + self.positions.weight[: ids.shape[1]]
        valid = ids != self.ids[PAD]
        for block in self.blocks:
            tokens = block(tokens, valid)
        vectors: Tensor = self.norm(tokens[:, 0])
        return vectors
