"""The robot policy: from images, an instruction and the robot's state to chunks of actions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from atlas.errors import ConfigError
from atlas.models.protocol import ActionHead
from atlas.protocol import offers


class VLA(nn.Module):
    """A vision-language-action policy of four parts.

    spec: the `spec` of the training set: `cameras`, `image_size`, `state_dim`, `history`,
    `action_dim`, `horizon`, `vocabulary`, `relative` and the `statistics` of the training split
    (of `state`, `actions` and, if states have a history, `velocity`). `discrete` (default False):
    an action is one of `action_dim` choices, in the data a one-hot vector, which is not
    normalised. The parts are factories, called with the sizes that follow from the spec.
    Statistics are buffers, so a checkpoint contains the units of its actions.
    """

    state_mean: Tensor  # [S]
    state_std: Tensor
    velocity_mean: Tensor  # [S]; of the difference between successive states
    velocity_std: Tensor
    actions_mean: Tensor  # [A]; of actions minus the current state, if the spec is relative
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
        _check_spec(spec)
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
        for name, moments in _statistics(spec).items():
            mean, std = (
                torch.tensor(list(moments[key]), dtype=torch.float32) for key in ("mean", "std")
            )
            self.register_buffer(f"{name}_mean", mean)
            # A joint that never moved in training has no scale, so it keeps its own unit.
            self.register_buffer(f"{name}_std", torch.where(std > 1e-6, std, 1.0))

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return loss and measures of the predicted chunks, float32 scalars.

        batch: `images` uint8 [B, V, 3, H, W], `state` [B, K, S] and `actions` [B, T, A] in their
        own units, `instruction` a list of B strings, `action_mask` [B, T], True if valid.
        `features` [B, V, P, C], the output of the vision module for the images, can replace
        `images`.

        `loss` is the head's mean error of normalised actions over valid elements, `weight` the
        number of these elements. Further scalars are the means of the head's measures: `l1` the
        L1 error of the actions in their own units, if the head knows it, and `accuracy` for
        discrete actions. All are 0 if no element is valid.
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
    def act(self, batch: Mapping[str, Any]) -> Tensor:
        """Return actions [B, T, A] in their own units, from observations on any device.

        For discrete actions, return the probability of each.
        """
        device = self.actions_mean.device
        moved = {n: batch[n].to(device) for n in ("images", "features", "state") if n in batch}
        batch = {**batch, **moved}
        actions = self.action_head(self._join(batch)).float() * self.actions_std + self.actions_mean
        return self._shift(actions, batch["state"], 1)

    def _shift(self, actions: Tensor, state: Tensor, sign: int) -> Tensor:
        """Return `actions` plus `sign` times the current state if relative, else unchanged."""
        if not self.relative:
            return actions
        return actions + sign * state[:, -1:, : self.action_dim]

    def _join(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the fused vector of vision, language and state, [B, width]."""
        patches = self._features(batch)
        language = self.lang_encoder(batch["instruction"])
        joined: Tensor = self.fusion(patches, language, self._describe(batch["state"]))
        return joined

    def _features(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the features in the batch or, if missing, of its images, [B, V, P, C]."""
        if "features" in batch:
            # They are stored in float16; the policy computes in its own type.
            features: Tensor = batch["features"].to(self.actions_mean.dtype)
        else:
            features = self.vision(batch["images"])
        return features

    def _describe(self, state: Tensor) -> Tensor:
        """Return the current state and the changes before it, [B, K * S], normalised separately.

        Successive states differ by a small part of the range of all states. From normalised states
        alone, the network could hardly recognise how fast the robot moves.
        """
        last = (state[:, -1] - self.state_mean) / self.state_std
        changes = (state.diff(dim=1) - self.velocity_mean) / self.velocity_std
        return torch.cat([last, changes.flatten(1)], dim=1)


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """Return the mean of values [B, T, .] over `valid` of their B x T rows; the others are 0.

    If none is valid, return 0.
    """
    return values.sum() / (valid * values.shape[-1]).clamp(min=1.0)


def _statistics(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the statistics of the spec, completed by defaults for velocity and discrete actions."""
    at_rest = {"mean": [0.0] * spec["state_dim"], "std": spec["statistics"]["state"]["std"]}
    statistics = {"velocity": at_rest, **spec["statistics"]}
    if spec.get("discrete"):
        zeros, ones = [0.0] * int(spec["action_dim"]), [1.0] * int(spec["action_dim"])
        statistics["actions"] = {"mean": zeros, "std": ones}
    return statistics


def _check_spec(spec: Mapping[str, Any]) -> None:
    if spec["relative"] and spec.get("discrete"):
        raise ConfigError("discrete actions cannot be relative to the state; use absolute actions")
    if spec["relative"] and spec["state_dim"] < spec["action_dim"]:
        raise ConfigError(
            f"actions relative to the state need a state with at least action_dim="
            f"{spec['action_dim']} entries, but state_dim={spec['state_dim']}; use absolute actions"
        )
    for name, size in (("state", spec["state_dim"]), ("actions", spec["action_dim"])):
        found = len(spec["statistics"][name]["mean"])
        if found != size:
            raise ConfigError(
                f"statistics of {name} have {found} entries, but {size} are expected; compute them "
                "again"
            )


def _check_head(head: Any, spec: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if only one of the head and the data has discrete actions."""
    discrete, chooses = bool(spec.get("discrete")), offers(head, ActionHead) and head.discrete
    if discrete and not chooses:
        raise ConfigError(
            f"model.action_head is a {type(head).__name__}, which predicts numbers, but an action "
            f"in the data is one of {spec['action_dim']}; set model/action_head=categorical"
        )
    if chooses and not discrete:
        raise ConfigError(
            f"model.action_head is a {type(head).__name__}, which chooses among discrete actions, "
            f"but actions in the data are vectors of {spec['action_dim']} numbers; set "
            "model/action_head=l1 or flow_matching"
        )
