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
from atlas.run import Run
from atlas.training.build import build_model
from atlas.training.checkpoint import Checkpoints, averaged, load_weights
from atlas.training.distributed import choose_device
from atlas.training.stream import to_device


class Policy:
    """Acts on one robot's observations; `reset` it when an episode begins.

    `model` is the trained module in eval mode, `spec` what its training data said about itself.
    """

    def __init__(
        self, model: nn.Module, spec: Mapping[str, Any] | None, device: torch.device
    ) -> None:
        self.model = model.to(device).eval()
        self.spec = spec
        self._device = device
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
        state = np.asarray(observation["state"], np.float32)
        self._states.append(state)
        past = list(self._states)
        history = [past[0]] * ((self._states.maxlen or 1) - len(past)) + past
        batch = {
            "images": self._images(observation["images"])[None],
            "state": torch.from_numpy(np.stack(history))[None],
            "instruction": [str(observation["instruction"])],
        }
        return self.act_batch(batch)[0].numpy()

    @torch.no_grad()
    def act_batch(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Chunks for a collated batch of observations, [B, horizon, action_dim] on the CPU."""
        model: Any = self.model
        actions: torch.Tensor = model.act(to_device(batch, self._device))
        return actions.float().cpu()

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
        return torch.stack([_resized(image, spec.get("image_size")) for image in images])


def load_policy(run: str | Path, device: str = "auto") -> Policy:
    """The best model of the run in directory `run`, its averaged weights where it has them.

    Needs nothing but the run's directory and the code of the model: no data set is opened.
    Raises `AtlasError` where there is no checkpoint.
    """
    found = Run(run)
    if not found.exists:
        raise AtlasError(f"{run} is not the directory of a run; it has no config.yaml")
    found.use_modules()
    saved = Checkpoints(found.checkpoints).best()
    if saved is None:
        raise AtlasError(f"{found.checkpoints} holds no checkpoint yet")
    model = build_model(found.config, saved["spec"])
    load_weights(model, averaged(saved), str(found.checkpoints))
    return Policy(model, saved["spec"], choose_device(device, 0))


def _resized(image: Any, size: Sequence[int] | None) -> torch.Tensor:
    pixels = torch.as_tensor(np.asarray(image)).permute(2, 0, 1)
    if size is None or tuple(pixels.shape[1:]) == tuple(size):
        return pixels
    scaled = nn.functional.interpolate(
        pixels[None].float(), size=tuple(size), mode="bilinear", antialias=True, align_corners=False
    )
    return scaled[0].round().clamp(0, 255).to(torch.uint8)
