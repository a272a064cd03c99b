"""A trained policy, ready to act: from observations to actions with the best weights of a run."""

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
    """A policy that acts on one robot's observations; call `reset` at the start of an episode.

    `model`: the trained module in eval mode; `spec`: the `spec` of its training data; `step`: the
    number of updates that trained it.
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
        """Return the next chunk of actions, [horizon, action_dim] in the data's own units.

        `observation` holds `images` (a mapping from camera name to [H, W, 3] uint8, or a sequence
        in the order of `spec["cameras"]`), `state` ([state_dim]) and `instruction` (text). Images
        of another size are resized. If the policy has a history, it remembers earlier states; at
        the start of an episode the first state is repeated.
        """
        if absent := [key for key in OBSERVED if key not in observation]:
            raise AtlasError(
                f"observation has no {', '.join(absent)}; a policy needs {', '.join(OBSERVED)}"
            )
        images = self._images(observation["images"])
        # Appended after all checks, so that an invalid observation leaves no state behind.
        self._states.append(self._state(observation["state"]))
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
        """Return chunks [B, horizon, action_dim] on the CPU for a collated batch of observations."""
        model: Any = self.model
        actions: torch.Tensor = model.act(to_device(batch, self.device))
        return actions.float().cpu()

    def _state(self, state: Any) -> np.ndarray[Any, Any]:
        """Return the state as float32; raise `AtlasError` unless its shape is [state_dim]."""
        found = np.asarray(state, np.float32)
        size = (self.spec or {}).get("state_dim")
        if size is not None and found.shape != (size,):
            raise AtlasError(
                f"observation['state'] has the shape {list(found.shape)}, but the policy was trained "
                f"with [{size}]; pass a state of that shape"
            )
        return found

    def _images(self, images: Any) -> torch.Tensor:
        """Return the images in the cameras' order and at the data's size, uint8 [V, 3, H, W]."""
        spec = self.spec or {}
        names: Sequence[str] = spec.get("cameras", [])
        if isinstance(images, Mapping):
            if absent := [name for name in names if name not in images]:
                raise AtlasError(
                    f"observation['images'] has no {', '.join(absent)}; the policy needs the "
                    f"cameras {', '.join(names)}"
                )
            images = [images[name] for name in names]
        if names and len(images) != len(names):
            raise AtlasError(
                f"observation['images'] has {len(images)} images; the policy needs one of each of "
                f"the {len(names)} cameras {', '.join(names)}"
            )
        return torch.stack([_resize(image, spec.get("image_size")) for image in images])


def load_policy(run: str | Path, device: str = "auto", trust: Sequence[str] = ()) -> Policy:
    """Return the best policy of a run, with its averaged weights if it has them.

    `run`: a run's directory, or a folder that `atlas export` has written. Only this directory and
    the model's code are needed: no data set is opened, and no pretrained weights are read. Raises
    `AtlasError` if there is no checkpoint. Also raises it if another user's run names code outside
    Atlas and torch, unless its import path starts with a prefix in `trust` (`["my_parts"]`).
    """
    exported = export.is_export(run)
    saved = export.read(run) if exported else export.read_run(Run(run))
    file = Path(run) / export.POLICY if exported else Run(run).config_file
    extend_sys_path(file, saved.config["run"]["sys_path"], trust)
    # Only the model is checked, because nothing else of the configuration is built here.
    require_trust(file, {"model": saved.config["model"]}, trust)
    with without_weights():  # all weights are in `saved`
        model = build_model(saved.config, saved.spec)
    load_weights(model, saved.weights, str(run))
    return Policy(model, saved.spec, choose_device(device, 0), saved.step)


def _resize(image: Any, size: Sequence[int] | None) -> torch.Tensor:
    # Copied, because torch warns of the read-only arrays that cameras' buffers often are.
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if size is None or tuple(pixels.shape[1:]) == tuple(size):
        return pixels
    scaled = nn.functional.interpolate(
        pixels[None].float(), size=tuple(size), mode="bilinear", antialias=True, align_corners=False
    )
    return scaled[0].round().clamp(0, 255).to(torch.uint8)
