"""A policy from cameras, an instruction and the robot's state to chunks of actions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from atlas.errors import ConfigError
from atlas.models.protocol import ActionHead
from atlas.protocol import offers

Batch = Mapping[str, Any]


class VLA(nn.Module):
    """Vision, language and action, put together from four parts.

    spec: what a data set says of itself (`train.spec`): `cameras`, `image_size`, `state_dim`,
    `history`, `action_dim`, `horizon`, `vocabulary`, `relative` and the training split's
    `statistics` (of `state`, `actions` and, where states have a history, `velocity`). `discrete`
    (False where it is left out): one of `action_dim` actions is taken at a time, and an action is
    a vector with a 1 for it among zeros, which no statistics shift or scale. The parts are
    factories that are called with the sizes that follow from it.
    Statistics are buffers, so a checkpoint's weights come with the units that they act in.
    """

    state_mean: Tensor  # [S]
    state_std: Tensor
    velocity_mean: Tensor  # [S]; of the difference between neighbouring states
    velocity_std: Tensor
    actions_mean: Tensor  # [A]; of actions less the last state, where the spec is relative
    actions_std: Tensor

    def __init__(
        self,
        vision: Callable[..., nn.Module],
        lang_encoder: Callable[..., nn.Module],
        fusion: Callable[..., nn.Module],
        action_head: Callable[..., nn.Module],
        spec: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.relative, self.action_dim = bool(spec["relative"]), int(spec["action_dim"])
        _check(spec)
        self.vision: Any = vision(image_size=list(spec["image_size"]))
        self.lang_encoder: Any = lang_encoder(vocabulary=list(spec["vocabulary"]))
        self.fusion: Any = fusion(
            cameras=len(spec["cameras"]),
            grid=self.vision.grid,
            vision_width=self.vision.width,
            language_width=self.lang_encoder.width,
            state_width=spec["history"] * spec["state_dim"],
        )
        self.action_head: Any = action_head(
            width=self.fusion.width, horizon=spec["horizon"], action_dim=self.action_dim
        )
        _check_head(self.action_head, spec)
        still = {"mean": [0.0] * spec["state_dim"], "std": spec["statistics"]["state"]["std"]}
        statistics = {"velocity": still, **spec["statistics"]}
        if spec.get("discrete"):
            zeros, ones = [0.0] * self.action_dim, [1.0] * self.action_dim
            statistics["actions"] = {"mean": zeros, "std": ones}
        for name, moments in statistics.items():
            mean, std = (
                torch.tensor(list(moments[key]), dtype=torch.float32) for key in ("mean", "std")
            )
            self.register_buffer(f"{name}_mean", mean)
            # What never moved in training is left in its own unit: there is no scale to tell.
            self.register_buffer(f"{name}_std", torch.where(std > 1e-6, std, 1.0))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """How far the predicted chunks are from the demonstrated ones, as float32 scalars.

        batch: `images` uint8 [B, V, 3, H, W], `state` [B, K, S] and `actions` [B, T, A] in their
        own units, `instruction` a list of B strings, `action_mask` [B, T], True where valid.
        `features` [B, V, P, C], what the vision module returns for the images, may stand in for
        them. Returns `loss`, the head's error of normalised actions, `weight`, how many valid
        elements it is the mean of, and the means of what the head measures besides: `l1`, the L1
        of the actions it would take in their own units, where it knows them, and `accuracy` of
        discrete ones; all 0 where none is valid.
        """
        mask = batch["action_mask"]
        actions = self._shift(batch["actions"], batch["state"], -1)
        target = (actions - self.actions_mean) / self.actions_std
        errors, measures = self.action_head.errors(self._join(batch), target, mask)
        out = {name: values.detach() for name, values in measures.items()}
        if "l1" in out:
            out["l1"] = out["l1"] * self.actions_std
        valid = mask.sum().float()
        means = {name: _mean(values, valid) for name, values in {"loss": errors, **out}.items()}
        return {**means, "weight": valid * errors.shape[-1]}

    @torch.no_grad()
    def act(self, batch: Batch) -> Tensor:
        """[B, T, A] actions in their own units, from raw observations on any device.

        Of discrete actions it is the probability of each.
        """
        device = self.actions_mean.device
        seen = {n: batch[n].to(device) for n in ("images", "features", "state") if n in batch}
        batch = {**batch, **seen}
        actions = self.action_head(self._join(batch)).float() * self.actions_std + self.actions_mean
        return self._shift(actions, batch["state"], 1)

    def _shift(self, actions: Tensor, state: Tensor, sign: int) -> Tensor:
        """`actions` with the robot's last state added (1) or taken away (-1), where relative."""
        if not self.relative:
            return actions
        return actions + sign * state[:, -1:, : self.action_dim]

    def _join(self, batch: Batch) -> Tensor:
        """[B, width]: all that is seen, asked for and known of the robot."""
        patches = self._see(batch)
        language = self.lang_encoder(batch["instruction"])
        joined: Tensor = self.fusion(patches, language, self._describe(batch["state"]))
        return joined

    def _see(self, batch: Batch) -> Tensor:
        """[B, V, P, C] features: those of the batch, or else those of its images."""
        if "features" in batch:
            # Kept in float16, and computed with in what the rest is.
            features: Tensor = batch["features"].to(self.actions_mean.dtype)
        else:
            features = self.vision(batch["images"])
        return features

    def _describe(self, state: Tensor) -> Tensor:
        """[B, K * S]: the last state and the changes that led to it, each in its own scale.

        Neighbouring states differ by little of the range that all states span, so that a network
        would hardly see from normalised states how fast the robot moves.
        """
        last = (state[:, -1] - self.state_mean) / self.state_std
        changes = (state.diff(dim=1) - self.velocity_mean) / self.velocity_std
        return torch.cat([last, changes.flatten(1)], dim=1)


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """Of values [B, T, .] that are 0 but for `valid` of their B x T rows; 0 where there is none."""
    return values.sum() / (valid * values.shape[-1]).clamp(min=1.0)


def _check(spec: Mapping[str, Any]) -> None:
    if spec["relative"] and spec.get("discrete"):
        raise ConfigError("discrete actions cannot be relative to the state; use absolute actions")
    if spec["relative"] and spec["state_dim"] < spec["action_dim"]:
        raise ConfigError(
            f"actions relative to the state need a state of at least action_dim="
            f"{spec['action_dim']} entries, but state_dim={spec['state_dim']}; use absolute actions"
        )
    for name, size in (("state", spec["state_dim"]), ("actions", spec["action_dim"])):
        found = len(spec["statistics"][name]["mean"])
        if found != size:
            raise ConfigError(
                f"statistics of {name} have {found} entries, expected {size}; compute them again"
            )


def _check_head(head: Any, spec: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for numbers where actions are discrete, and for choices where not."""
    discrete, chooses = bool(spec.get("discrete")), offers(head, ActionHead) and head.discrete
    if discrete and not chooses:
        raise ConfigError(
            f"model.action_head is a {type(head).__name__}, which predicts numbers, and the data's "
            f"actions are one of {spec['action_dim']}; set model/action_head=categorical"
        )
    if chooses and not discrete:
        raise ConfigError(
            f"model.action_head is a {type(head).__name__}, which chooses among discrete actions, "
            f"and the data's are vectors of {spec['action_dim']} numbers; set model/action_head=l1 "
            "or flow_matching"
        )
