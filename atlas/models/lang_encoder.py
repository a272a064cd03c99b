"""A language encoder trained from scratch: a small transformer over a vocabulary of words."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from atlas.models.layers.transformer import Block

PAD, UNKNOWN, START = "<pad>", "<unk>", "<start>"


class WordEncoder(nn.Module):
    """A vector for each instruction: the output at a start token, which precedes every text.

    vocabulary: words with an embedding; any other word is `<unk>`.
    length: maximal number of tokens, the start token included; longer instructions are truncated.
    Batches are padded to a multiple of 8 tokens, so that there are few different shapes.
    """

    untraced = ("tokenize",)  # Python code on text, which cannot be compiled

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
        """Return start token, words and padding of B texts, int64 [B, L] on the module's device."""
        rows = [self._known.get(text) or self._row(text) for text in texts]
        longest = min(-(-max(map(len, rows)) // 8) * 8, self.length)
        rows = [row + [self.ids[PAD]] * (longest - len(row)) for row in rows]
        # Non-blocking: the host must not wait for the copy of a few integers.
        return torch.tensor(rows).to(self.embed.weight.device, non_blocking=True)

    def _row(self, text: str) -> list[int]:
        words = [START, *re.findall(r"[^\W_]+", text.lower())][: self.length]
        row = [self.ids.get(word, self.ids[UNKNOWN]) for word in words]
        self._known[text] = row
        return row

    def forward(self, texts: list[str]) -> Tensor:
        """Return one vector for each of B instructions, [B, width]."""
        ids = self.tokenize(texts)
        tokens = self.embed(ids) + self.positions.weight[: ids.shape[1]]
        valid = ids != self.ids[PAD]
        for block in self.blocks:
            tokens = block(tokens, valid)
        vectors: Tensor = self.norm(tokens[:, 0])
        return vectors
