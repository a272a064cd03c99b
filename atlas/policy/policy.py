"""A trained policy, ready to act: the best weights of a run, raw observations in, actions out."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from atlas.errors import AtlasError
from atlas.models.pretrained import without_weights
from atlas.policy import export
from atlas.run.directory import Run
from atlas.run.trust import extend_sys_path, require_trust
from atlas.training.build import build_model
from atlas.training.feeding.stream import to_device
from atlas.training.ranks.world import choose_device
from atlas.training.saving.checkpoint import load_weights

OBSERVED = ("images", "state", "instruction")


class Policy:
    """Acts on one robot's observations; `reset` it when an episode begins.

    `model` is the trained module in eval mode, `spec` what its training data said about itself,
    `step` the number of updates that it has had.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: Mapping[str, Any] | None,
        device: torch.device,
        step: int | None = None,
    ) -> None:
        self.model = model.to(device).eval()
        self.spec = spec
        self.device = device
        self.step = step
        self._states: deque[np.ndarray[Any, Any]] = deque(maxlen=(spec or {}).get("history", 1))

    def reset(self) -> None:
        """Forget the states of the last episode."""
        self._states.clear()

    def act(self, observation: Mapping[str, Any]) -> np.ndarray[Any, Any]:
        """The next chunk of actions, [horizon, action_dim] in the data's own units.

        `observation` holds `images` (a mapping from camera name to [H, W, 3] uint8, or a sequence
        in the order of `spec["cameras"]`), `state` ([state_dim]) and `instruction` (text). Images
        of another size are resized; earlier states are remembered where the policy has a history.
        """
        if lacking := [key for key in OBSERVED if key not in observation]:
            raise AtlasError(
                f"observation lacks {', '.join(lacking)}; a policy acts on {', '.join(OBSERVED)}"
            )
        images = self._images(observation["images"])
        self._states.append(self._state(observation["state"]))  # last: what is refused leaves none
        past = list(self._states)
        history = [past[0]] * ((self._states.maxlen or 1) - len(past)) + past
        batch = {
            "images": images[None],
            "state": torch.from_numpy(np.stack(history))[None],
            "instruction": [str(observation["instruction"])],
        }
        return self.act_batch(batch)[0].numpy()

    @torch.no_grad()
    def act_batch(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Chunks for a collated batch of observations, [B, horizon, action_dim] on the CPU."""
        model: Any = self.model
        actions: torch.Tensor = model.act(to_device(batch, self.device))
        return actions.float().cpu()

    def _state(self, state: Any) -> np.ndarray[Any, Any]:
        """[state_dim], as it was in the data."""
        found = np.asarray(state, np.float32)
        size = (self.spec or {}).get("state_dim")
        if size is not None and found.shape != (size,):
            raise AtlasError(
                f"observation['state'] has the shape {list(found.shape)}; the policy was trained "
                f"with [{size}]"
            )
        return found

    def _images(self, images: Any) -> torch.Tensor:
        """[cameras, 3, H, W] uint8 at the size that the data had."""
        spec = self.spec or {}
        names: Sequence[str] = spec.get("cameras", [])
        if isinstance(images, Mapping):
            missing = [name for name in names if name not in images]
            if missing:
                raise AtlasError(
                    f"observation['images'] lacks {', '.join(missing)}; the policy was trained "
                    f"with the cameras {', '.join(names)}"
                )
            images = [images[name] for name in names]
        if names and len(images) != len(names):
            raise AtlasError(
                f"observation['images'] has {len(images)} of the {len(names)} cameras "
                f"{', '.join(names)}"
            )
        return torch.stack([_resized(image, spec.get("image_size")) for image in images])


def load_policy(run: str | Path, device: str = "auto", trust: Sequence[str] = ()) -> Policy:
    """The best model of the run in directory `run`, its averaged weights where it has them.

    `run` can also be a folder that `atlas export` has written. Needs nothing but that directory
    and the code of the model: no data set is opened, and no pretrained weights are read. Raises
    `AtlasError` where there is no checkpoint, and for a run of somebody else that names more than
    parts of Atlas and torch, unless under a prefix in `trust` (such as `["my_parts"]`).
    """
    exported = export.is_export(run)
    saved = export.read(run) if exported else export.read_run(Run(run))
    file = Path(run) / export.POLICY if exported else Run(run).config_file
    extend_sys_path(file, saved.config["run"]["sys_path"], trust)
    # A policy is a model: what else the configuration names is not made.
    require_trust(file, {"model": saved.config["model"]}, trust)
    with without_weights():  # all weights are in `saved`
        model = build_model(saved.config, saved.spec)
    load_weights(model, saved.weights, str(run))
    return Policy(model, saved.spec, choose_device(device, 0), saved.step)


def _resized(image: Any, size: Sequence[int] | None) -> torch.Tensor:
    pixels = torch.as_tensor(np.asarray(image)).permute(2, 0, 1)
    if size is None or tuple(pixels.shape[1:]) == tuple(size):
        return pixels
    scaled = nn.functional.interpolate(
        pixels[None].float(), size=tuple(size), mode="bilinear", antialias=True, align_corners=False
    )
    return scaled[0].round().clamp(0, 255).to(torch.uint8)
