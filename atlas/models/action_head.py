"""Action heads: regression, flow matching, and a choice among discrete actions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from atlas.models.layers.transformer import Block


class ActionHead(nn.Module):
    """Base of the action heads: from the fused vector to a chunk of normalised actions.

    `forward(features)` returns the chunk to act with, [B, T, A]; `errors` what training needs. See
    `atlas.models.protocol.ActionHead`.

    discrete: whether the actions are discrete, which is one-hot vectors in the data.
    """

    discrete = False

    def errors(
        self, features: Tensor, actions: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the error of each element, float32 [B, T, E], and further measures by name.

        The mean of the errors over the valid steps is the loss. Measures are float32 [B, T, .]:
        `l1` [B, T, A] is the absolute error of the chunk to act with, if it is cheap to compute.
        All are exactly 0 where `mask` [B, T] is False.
        """
        raise NotImplementedError


def perceptron(width: int, hidden: int, out: int, dropout: float) -> nn.Sequential:
    """Return an MLP with one hidden layer."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, out)
    )


class PerceptronHead(ActionHead):
    """A head that computes all numbers of a chunk with one MLP."""

    def __init__(
        self, width: int, horizon: int, action_dim: int, hidden: int = 256, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.shape = (horizon, action_dim)
        self.layers = perceptron(width, hidden, horizon * action_dim, dropout)


class ChunkHead(PerceptronHead):
    """Regression of all `horizon` actions of a chunk, trained by the L1 error."""

    def forward(self, features: Tensor) -> Tensor:
        """Return actions [B, T, A] for features [B, width]."""
        actions: Tensor = self.layers(features)
        return actions.view(-1, *self.shape)

    def errors(
        self, features: Tensor, actions: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the absolute errors, which are also the measure `l1`."""
        errors = _distances(self(features), actions, mask)
        return errors, {"l1": errors}


class CategoricalHead(PerceptronHead):
    """The probability of each of `action_dim` discrete actions, for each step independently.

    It is trained by the cross-entropy, in nats. It returns probabilities; the caller chooses an
    action.
    """

    discrete = True

    def forward(self, features: Tensor) -> Tensor:
        """Return probabilities, float32 [B, T, A], for features [B, width]."""
        return self._logits(features).softmax(dim=-1)

    def errors(
        self, features: Tensor, actions: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return cross-entropies [B, T, 1] and the measures `accuracy` and `l1`.

        `accuracy` is 1 where the most probable action is the demonstrated one. `l1` is the
        distance of the probabilities from the one-hot vector: its mean over A actions, times A / 2,
        is the probability of drawing another action than the demonstrated one.
        """
        logits = self._logits(features)
        demonstrated = actions.masked_fill(~mask[..., None], 0.0).argmax(dim=-1)
        errors = nn.functional.cross_entropy(
            logits.flatten(0, 1), demonstrated.flatten(), reduction="none"
        )
        correct = (logits.argmax(dim=-1) == demonstrated) & mask
        return errors.view_as(demonstrated).masked_fill(~mask, 0.0)[..., None], {
            "accuracy": correct.float()[..., None],
            "l1": _distances(logits.softmax(dim=-1), actions, mask),
        }

    def _logits(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layers(features)
        return logits.float().view(-1, *self.shape)


class FlowMatchingHead(ActionHead):
    """Flow matching: a learned velocity turns noise into a chunk of actions (Lipman et al. 2023).

    Straight lines `t * noise + (1 - t) * actions` connect noise at time 1 with actions at time 0;
    their velocity is `noise - actions`. The network learns to predict the velocity at a random
    point of such a line, with t from Beta(1.5, 1), so mostly near the noise, as in pi0 (Black et
    al. 2024). To act, `steps` Euler steps lead from noise to actions. That noise is a constant of
    the module, drawn once by a separate generator with `seed`, so acting is deterministic and a
    sample's actions do not depend on the rest of the batch.

    Each action of the chunk is a token of a transformer with `depth` blocks. Tokens past an
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
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(horizon, action_dim, generator=generator)
        self.register_buffer("noise", noise, persistent=False)
        # Periods from 2 pi down to a hundredth of it, enough to distinguish times 1/50 apart.
        scales = torch.exp(torch.linspace(0.0, math.log(100.0), hidden // 2))
        self.register_buffer("frequencies", scales, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return actions [B, T, A] for features [B, width], after `steps` Euler steps."""
        chunk = self.noise.expand(len(features), -1, -1)
        for step in range(self.steps, 0, -1):
            time = torch.full((len(features), 1), step / self.steps, device=features.device)
            chunk = chunk - self._velocity(chunk, time, features, None) / self.steps
        return chunk

    def errors(
        self, features: Tensor, actions: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the squared errors of the velocity, and in eval mode the measure `l1`.

        `l1` needs the Euler steps, so it is not computed in training. Time and noise come from
        torch's global generator.
        """
        actions = actions.float().masked_fill(~mask[..., None], 0.0)
        noise = torch.randn_like(actions)
        # Inverse transform sampling: the distribution function of Beta(1.5, 1) is t ** 1.5.
        time = torch.rand(len(actions), 1, device=actions.device) ** (1 / 1.5)
        points = time[..., None] * noise + (1 - time[..., None]) * actions
        velocity = self._velocity(points, time, features, mask)
        errors = (velocity - (noise - actions)).masked_fill(~mask[..., None], 0.0).square()
        if self.training:
            return errors, {}
        return errors, {"l1": _distances(self(features), actions, mask)}

    def _velocity(
        self, chunk: Tensor, time: Tensor, features: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Return the velocity, float32 [B, T, A], of `chunk` [B, T, A] at `time` [B, 1]."""
        angles = time * self.frequencies
        time_embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
        condition = self.condition(torch.cat([features.float(), time_embedding], dim=1))
        tokens = self.action(chunk) + self.position_embedding + condition[:, None]
        # A chunk without a valid action attends to all tokens: a softmax over none would be NaN.
        valid = None if mask is None else mask | ~mask.any(dim=1, keepdim=True)
        for block in self.blocks:
            tokens = block(tokens, valid)
        velocity: Tensor = self.out(self.norm(tokens))
        return velocity.float()


def _distances(predicted: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
    """Return absolute errors, float32 [B, T, A], exactly 0 where `mask` [B, T] is False."""
    errors = predicted.float() - actions.float()
    # Masked before the absolute value, so that the padding has no gradient either.
    return errors.masked_fill(~mask[..., None], 0.0).abs()
