"""Chunks of actions: numbers by regression or out of noise, or choices among discrete ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from atlas.models.layers.transformer import Block


class ActionHead(nn.Module):
    """The joined feature to a chunk of actions in normalised units, whatever they stand for.

    `forward(features)` is the chunk to act with, [B, T, A]. `errors(features, actions, mask)` is
    what is learned from: an error for each element, float32 [B, T, E], whose mean over the valid
    ones is the loss, and by name what is measured besides, each float32 [B, T, .]: `l1` [B, T, A],
    the absolute distance of the chunk to act with, where it is known without much ado. All are
    exactly 0 where `mask` [B, T] is False.

    discrete: whether it is for actions of which one is taken, a 1 among zeros in the data.
    """

    discrete = False

    def errors(
        self, features: Tensor, actions: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError


def perceptron(width: int, hidden: int, out: int, dropout: float) -> nn.Sequential:
    """One hidden layer."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, out)
    )


class AtOnceHead(ActionHead):
    """All numbers of a chunk from one perceptron."""

    def __init__(
        self, width: int, horizon: int, action_dim: int, hidden: int = 256, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.shape = (horizon, action_dim)
        self.layers = perceptron(width, hidden, horizon * action_dim, dropout)


class ChunkHead(AtOnceHead):
    """All `horizon` actions of a chunk at once, trained by L1."""

    def forward(self, features: Tensor) -> Tensor:
        """features [B, width]; returns [B, T, A]."""
        actions: Tensor = self.layers(features)
        return actions.view(-1, *self.shape)

    def errors(
        self, features: Tensor, actions: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The error is the distance itself."""
        errors = _distances(self(features), actions, mask)
        return errors, {"l1": errors}


class CategoricalHead(AtOnceHead):
    """How likely each of `action_dim` discrete actions is, for every step of a chunk by itself.

    Trained by the cross-entropy, in nats. What it acts with are probabilities; whoever executes
    them chooses.
    """

    discrete = True

    def forward(self, features: Tensor) -> Tensor:
        """features [B, width]; returns probabilities [B, T, A], float32."""
        return self._scores(features).softmax(dim=-1)

    def errors(
        self, features: Tensor, actions: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropies [B, T, 1], and `accuracy`: 1 where the most likely action is the true one.

        `l1` is the distance of the probabilities from a 1 among zeros: times A / 2, how likely
        another action would be drawn than the true one.
        """
        scores = self._scores(features)
        taken = actions.masked_fill(~mask[..., None], 0.0).argmax(dim=-1)
        errors = nn.functional.cross_entropy(
            scores.flatten(0, 1), taken.flatten(), reduction="none"
        )
        right = (scores.argmax(dim=-1) == taken) & mask
        return errors.view_as(taken).masked_fill(~mask, 0.0)[..., None], {
            "accuracy": right.float()[..., None],
            "l1": _distances(scores.softmax(dim=-1), actions, mask),
        }

    def _scores(self, features: Tensor) -> Tensor:
        scores: Tensor = self.layers(features)
        return scores.float().view(-1, *self.shape)


class FlowMatchingHead(ActionHead):
    """The velocity that carries noise to a chunk of actions (Lipman et al. 2023).

    Between noise at time 1 and actions at time 0 lie straight lines, `t * noise + (1 - t) *
    actions`, whose velocity is `noise - actions`. The network is asked for it at a random place
    of a random line, with t from Beta(1.5, 1): mostly near the noise, as in pi0 (Black et al.
    2024). To act, `steps` Euler steps go from noise to actions. The noise is a constant of the
    module, drawn by a generator of its own from `seed`: acting is deterministic, and a sample's
    actions do not depend on what else is in the batch.

    Each action of the chunk is a token of a transformer of `depth` blocks. Tokens past an
    episode's end are not attended to.
    """

    noise: Tensor  # [T, A]
    frequencies: Tensor

    def __init__(
        self,
        width: int,
        horizon: int,
        action_dim: int,
        hidden: int = 128,
        depth: int = 2,
        heads: int = 4,
        steps: int = 8,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.steps = steps
        self.action = nn.Linear(action_dim, hidden)
        self.position_embedding = nn.Parameter(torch.randn(horizon, hidden) * 0.02)
        self.condition = nn.Sequential(
            nn.Linear(width + hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        self.blocks = nn.ModuleList(Block(hidden, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, action_dim)
        own = torch.Generator().manual_seed(seed)
        noise = torch.randn(horizon, action_dim, generator=own)
        self.register_buffer("noise", noise, persistent=False)
        # Periods from 2 pi down to a hundredth of that: steps of 1/50 are told apart with ease.
        scales = torch.exp(torch.linspace(0.0, math.log(100.0), hidden // 2))
        self.register_buffer("frequencies", scales, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """features [B, width]; returns [B, T, A] after `steps` Euler steps."""
        chunk = self.noise.expand(len(features), -1, -1)
        for step in range(self.steps, 0, -1):
            time = torch.full((len(features), 1), step / self.steps, device=features.device)
            chunk = chunk - self._velocity(chunk, time, features, None) / self.steps
        return chunk

    def errors(
        self, features: Tensor, actions: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The square of the velocity's error; `l1` in eval mode alone, as it takes steps.

        Time and noise come from torch's global generator.
        """
        actions = actions.float().masked_fill(~mask[..., None], 0.0)
        noise = torch.randn_like(actions)
        # The inverse of Beta(1.5, 1)'s distribution function, t ** 1.5.
        time = torch.rand(len(actions), 1, device=actions.device) ** (1 / 1.5)
        between = time[..., None] * noise + (1 - time[..., None]) * actions
        velocity = self._velocity(between, time, features, mask)
        errors = (velocity - (noise - actions)).masked_fill(~mask[..., None], 0.0).square()
        if self.training:
            return errors, {}
        return errors, {"l1": _distances(self(features), actions, mask)}

    def _velocity(
        self, chunk: Tensor, time: Tensor, features: Tensor, mask: Tensor | None
    ) -> Tensor:
        """float32 [B, T, A] for `chunk` [B, T, A] at `time` [B, 1]."""
        angles = time * self.frequencies
        moment = torch.cat([angles.sin(), angles.cos()], dim=1)
        condition = self.condition(torch.cat([features.float(), moment], dim=1))
        tokens = self.action(chunk) + self.position_embedding + condition[:, None]
        # A chunk without a valid action attends to all: a softmax over nothing would be NaN.
        valid = None if mask is None else mask | ~mask.any(dim=1, keepdim=True)
        for block in self.blocks:
            tokens = block(tokens, valid)
        velocity: Tensor = self.out(self.norm(tokens))
        return velocity.float()


def _distances(predicted: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
    """[B, T, A] absolute errors in float32, exactly 0 where `mask` [B, T] is False."""
    errors = predicted.float() - actions.float()
    # Before the absolute value, so that whatever stands in the padding has no gradient either.
    return errors.masked_fill(~mask[..., None], 0.0).abs()
