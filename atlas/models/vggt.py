"""VGGT's aggregator as the policy's vision: all views of a moment together, in their order."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atlas.errors import ConfigError
from atlas.models import pretrained
from atlas.models.layers.images import GridPool, scaled, whole_patches
from atlas.models.protocol import HasPatchSize
from atlas.models.vision import VisionEncoder
from atlas.protocol import offers

KEY = "model.vision"
PATCH = 14  # pixels, the side of VGGT's patches
COMMIT = "a288dd0f14786c93483e45524328726ab7b1b4ce"  # the package has no versions
INSTALL = f"pip install --no-deps git+https://github.com/facebookresearch/vggt.git@{COMMIT}"
WEIGHTS = ("model.safetensors", "model.pt")  # the names of the published checkpoint's files
SIZES = "config.json"  # the file with the model's sizes, in the same folder
PREFIX = "aggregator."


class Vggt(VisionEncoder):
    """From views to features that contain the scene's geometry (Wang et al. 2025).

    The aggregator takes images [B, S, 3, H, W] from 0 to 1, which it normalises itself. It returns
    the outputs of its layers, [B, S, tokens, C], and the number of tokens before the patches of a
    view. It attends to all views, and the first view is its frame of reference, so a view's
    features depend on the other views and on their order.

    path: a checkpoint's file, the folder that holds it, or its name on the Hugging Face hub.
    aggregator: a factory of another module with the same interface, instead of the package's; it
    may have a `patch_size` in pixels (default 14). layers: the layers whose outputs are
    concatenated, each after a layer norm because their scales differ widely. grid: [rows, columns]
    that patches are averaged to; None keeps all. dtype: of the weights; None is float32.
    """

    def __init__(
        self,
        image_size: Sequence[int],
        path: str | None = None,
        aggregator: Callable[[], nn.Module] | None = None,
        resize: Sequence[int] | None = None,
        layers: Sequence[int] = (-1,),
        grid: Sequence[int] | None = None,
        dtype: str | None = None,
    ) -> None:
        super().__init__()
        self.dtype = pretrained.choose_dtype(dtype, f"{KEY}.dtype")
        self.aggregator: Any = aggregator() if aggregator else read_aggregator(path)
        patch = patch_size_of(self.aggregator)
        outputs, self.leading = self._probe(patch)
        self.layers = pretrained.choose_layers(layers, len(outputs), f"{KEY}.layers")
        _check_kept(outputs, self.layers)
        self.aggregator.to(self.dtype)
        self.image_size = whole_patches(image_size, resize, patch)
        self.pool = GridPool((self.image_size[0] // patch, self.image_size[1] // patch), grid)
        self.grid = self.pool.grid
        self.width = sum(outputs[n].shape[-1] for n in self.layers)

    def forward(self, images: Tensor) -> Tensor:
        """Return float32 features [B, V, P, width] of uint8 images [B, V, 3, H, W]."""
        samples, views = images.shape[:2]
        pixels = scaled(images.flatten(0, 1), self.image_size).unflatten(0, (samples, views))
        with pretrained.precision(self, self.dtype, images.device):
            outputs, _ = _call(self.aggregator, pixels.to(self.dtype))
        chosen = [outputs[n][:, :, self.leading :].float() for n in self.layers]
        patches = torch.cat([F.layer_norm(c, c.shape[-1:]) for c in chosen], dim=-1)
        features: Tensor = self.pool(patches.flatten(0, 1)).unflatten(0, (samples, views))
        return features

    def fingerprint(self) -> dict[str, Any]:
        """Return what determines the features besides the weights; see `VisionEncoder`."""
        return {
            "encoder": f"{type(self.aggregator).__module__}.{type(self.aggregator).__qualname__}",
            "layers": self.layers,
            "image_size": list(self.image_size),
            "grid": list(self.grid),
            "views": "all together, in their order",
            "dtype": str(self.dtype),
            "preprocessing": "bilinear with antialiasing, 0 to 1; each layer normalised",
        }

    def _probe(self, patch: int) -> tuple[list[Any], int]:
        """Return the layers' outputs for a tiny image, to learn their number and sizes."""
        training = self.aggregator.training
        with torch.no_grad():
            found = _call(self.aggregator.eval(), torch.zeros(1, 1, 3, 2 * patch, 2 * patch))
        self.aggregator.train(training)
        return found


def patch_size_of(aggregator: Any) -> int:
    """Return the side of an aggregator's patches in pixels, 14 if it does not say."""
    return int(aggregator.patch_size) if offers(aggregator, HasPatchSize) else PATCH


def read_aggregator(path: str | None) -> nn.Module:
    """Read VGGT's aggregator with the weights at `path`, without VGGT's heads."""
    module = pretrained.require("vggt.models.aggregator", "model=vla_vggt", INSTALL)
    if path is None:
        raise ConfigError(
            f"{KEY}.path is not set; set VGGT's checkpoint: a file, a folder, or its name on the "
            "Hugging Face hub, for example facebook/VGGT-1B (hf download facebook/VGGT-1B). The "
            "weights have another licence than the code: see docs/robot-policy.md"
        )
    file = find_checkpoint(path)
    aggregator: nn.Module = module.Aggregator(**_sizes(file, module.Aggregator))
    if pretrained.weights_wanted():
        _read_weights(aggregator, file)
    return aggregator


def find_checkpoint(path: str) -> Path:
    """Return the file with the weights; a name on the hub is downloaded or read from its cache.

    The file need not exist if no weights are to be read: only its folder is needed then.
    """
    found = Path(pretrained.locate(path, f"{KEY}.path"))
    if found.is_file():
        return found
    if not found.is_dir():
        return _from_hub(path)
    files = [found / name for name in WEIGHTS if (found / name).is_file()]
    if not pretrained.weights_wanted():
        return found / WEIGHTS[0]
    if not files:
        raise ConfigError(
            f"{KEY}.path={path} holds none of {', '.join(WEIGHTS)}; set the folder of a checkpoint"
        )
    return files[0]


def _from_hub(name: str) -> Path:
    hub = pretrained.require("huggingface_hub", f"{KEY}.path={name}", "pip install huggingface_hub")
    sizes = None
    with contextlib.suppress(OSError, ValueError):  # without this file the default sizes are right
        sizes = hub.hf_hub_download(name, SIZES)
    if not pretrained.weights_wanted():
        return Path(sizes).with_name(WEIGHTS[0]) if sizes else Path(name) / WEIGHTS[0]
    failures = []
    for file in WEIGHTS:
        try:
            return Path(hub.hf_hub_download(name, file))
        except (OSError, ValueError) as error:
            failures.append(error)
    raise pretrained.read_error(name, f"{KEY}.path", failures[0]) from failures[0]


def _sizes(checkpoint: Path, aggregator: Any) -> dict[str, Any]:
    """Read the values of config.json in the checkpoint's folder that the constructor takes."""
    file = checkpoint.with_name(SIZES)
    known = inspect.signature(aggregator).parameters
    sizes = json.loads(file.read_text()) if file.is_file() else {}
    return {name: value for name, value in sizes.items() if name in known}


def _read_weights(aggregator: nn.Module, file: Path) -> None:
    if file.suffix == ".safetensors":
        state = pretrained.require(
            "safetensors.torch", f"{KEY}.path={file}", "pip install safetensors"
        ).load_file(file)
    else:
        # weights_only: a downloaded checkpoint must not be able to run code.
        state = torch.load(file, map_location="cpu", weights_only=True)
    prefixed = {n.removeprefix(PREFIX): v for n, v in state.items() if n.startswith(PREFIX)}
    try:
        aggregator.load_state_dict(prefixed or state)
    except RuntimeError as error:
        raise ConfigError(
            f"{KEY}.path={file} holds other weights than this version of vggt expects "
            f"({' '.join(str(error).split())[:300]}); install the version that fits it: {INSTALL}"
        ) from error


def _call(aggregator: Any, images: Tensor) -> tuple[list[Any], int]:
    """Return the outputs of all layers, and the number of tokens before a view's patches."""
    # They are the first and the last returned value; some versions return more between them.
    outputs, *_, leading = aggregator(images)
    return list(outputs), int(leading)


def _check_kept(outputs: list[Any], layers: list[int]) -> None:
    # Newer versions of vggt return None for the layers that VGGT's heads do not use.
    kept = [n for n, output in enumerate(outputs) if output is not None]
    if dropped := [n for n in layers if n not in kept]:
        raise ConfigError(
            f"{KEY}.layers={layers}: this version of vggt does not keep layer {dropped[0]}; choose "
            f"among {', '.join(map(str, kept))}"
        )
