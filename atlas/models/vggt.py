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
from atlas.models.vision import VisionEncoder

KEY = "model.vision"
COMMIT = "a288dd0f14786c93483e45524328726ab7b1b4ce"  # the package has no versions
INSTALL = f"pip install --no-deps git+https://github.com/facebookresearch/vggt.git@{COMMIT}"
WEIGHTS = ("model.safetensors", "model.pt")  # the names of the published checkpoint's files
SIZES = "config.json"  # beside them
PREFIX = "aggregator."


class Vggt(VisionEncoder):
    """Views to features that know the scene's geometry (Wang et al. 2025).

    The aggregator takes images [B, S, 3, H, W] from 0 to 1, which it normalises by itself, and
    returns the outputs of its layers, [B, S, tokens, C], and how many tokens of a view come before
    its patches. Its attention runs over all views, and the first is its frame of reference: both
    the other views and their order count.

    path: a checkpoint's file, the folder that holds it, or its name on the Hugging Face hub.
    aggregator: a factory of another module of the same interface, in place of the package's.
    layers: whose outputs are put side by side, each normalised, since their scales differ widely.
    grid: [rows, columns] that patches are averaged to; None keeps all. dtype: of the weights.
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
        patch = int(getattr(self.aggregator, "patch_size", 14))
        outputs, self.leading = self._probe(patch)
        self.layers = pretrained.choose_layers(layers, len(outputs), f"{KEY}.layers")
        _check_kept(outputs, self.layers)
        self.aggregator.to(self.dtype)
        self.image_size = whole_patches(image_size, resize, patch)
        self.pool = GridPool((self.image_size[0] // patch, self.image_size[1] // patch), grid)
        self.grid = self.pool.grid
        self.width = sum(outputs[n].shape[-1] for n in self.layers)

    def forward(self, images: Tensor) -> Tensor:
        """images: uint8 [B, V, 3, H, W]; returns float32 [B, V, P, width]."""
        samples, views = images.shape[:2]
        pixels = scaled(images.flatten(0, 1), self.image_size).unflatten(0, (samples, views))
        with pretrained.precision(self, self.dtype, images.device):
            outputs, _ = _call(self.aggregator, pixels.to(self.dtype))
        chosen = [outputs[n][:, :, self.leading :].float() for n in self.layers]
        patches = torch.cat([F.layer_norm(c, c.shape[-1:]) for c in chosen], dim=-1)
        features: Tensor = self.pool(patches.flatten(0, 1)).unflatten(0, (samples, views))
        return features

    def fingerprint(self) -> dict[str, Any]:
        """What the weights do not tell."""
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
        """The layers' outputs for a tiny image: their sizes stand nowhere else."""
        training = self.aggregator.training
        with torch.no_grad():
            found = _call(self.aggregator.eval(), torch.zeros(1, 1, 3, 2 * patch, 2 * patch))
        self.aggregator.train(training)
        return found


def read_aggregator(path: str | None) -> nn.Module:
    """VGGT's aggregator with the weights at `path`, without the heads that come after it."""
    module = pretrained.need("vggt.models.aggregator", "model=vla_vggt", INSTALL)
    if path is None:
        raise ConfigError(
            f"{KEY}.path is not set; give VGGT's checkpoint: a file, a folder, or its name on the "
            "Hugging Face hub, as facebook/VGGT-1B (hf download facebook/VGGT-1B). The weights' "
            "licence is another than the code's: see docs/robot-policy.md"
        )
    file = find_checkpoint(path)
    aggregator: nn.Module = module.Aggregator(**_sizes(file, module.Aggregator))
    if pretrained.weights_wanted():
        _read_weights(aggregator, file)
    return aggregator


def find_checkpoint(path: str) -> Path:
    """The file with the weights; downloaded, or found in the hub's cache, where it is a name.

    Where weights are not wanted it need not be there: only what lies beside it is read.
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
        raise ConfigError(f"{KEY}.path={path} holds none of {', '.join(WEIGHTS)}")
    return files[0]


def _from_hub(name: str) -> Path:
    hub = pretrained.need("huggingface_hub", f"{KEY}.path={name}", "pip install huggingface_hub")
    sizes = None
    with contextlib.suppress(OSError, ValueError):  # without a file they are the published ones
        sizes = hub.hf_hub_download(name, SIZES)
    if not pretrained.weights_wanted():
        return Path(sizes).with_name(WEIGHTS[0]) if sizes else Path(name) / WEIGHTS[0]
    failures = []
    for file in WEIGHTS:
        try:
            return Path(hub.hf_hub_download(name, file))
        except (OSError, ValueError) as error:
            failures.append(error)
    raise pretrained.missing(name, f"{KEY}.path", failures[0]) from failures[0]


def _sizes(checkpoint: Path, aggregator: Any) -> dict[str, Any]:
    """Of a config.json beside the checkpoint, what the aggregator's constructor takes."""
    beside = checkpoint.with_name(SIZES)
    known = inspect.signature(aggregator).parameters
    sizes = json.loads(beside.read_text()) if beside.is_file() else {}
    return {name: value for name, value in sizes.items() if name in known}


def _read_weights(aggregator: nn.Module, file: Path) -> None:
    if file.suffix == ".safetensors":
        state = pretrained.need(
            "safetensors.torch", f"{KEY}.path={file}", "pip install safetensors"
        ).load_file(file)
    else:
        # weights_only: a checkpoint from elsewhere must not run code of its own.
        state = torch.load(file, map_location="cpu", weights_only=True)
    own = {n.removeprefix(PREFIX): value for n, value in state.items() if n.startswith(PREFIX)}
    try:
        aggregator.load_state_dict(own or state)
    except RuntimeError as error:
        raise ConfigError(
            f"{KEY}.path={file} holds other weights than this version of vggt expects: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error


def _call(aggregator: Any, images: Tensor) -> tuple[list[Any], int]:
    """The outputs of all layers, and how many tokens of a view come before its patches."""
    # The first and the last of what is returned: some versions have more between them.
    outputs, *_, leading = aggregator(images)
    return list(outputs), int(leading)


def _check_kept(outputs: list[Any], layers: list[int]) -> None:
    """Newer versions give None for the layers that VGGT's own heads do not read."""
    kept = [n for n, output in enumerate(outputs) if output is not None]
    if gone := [n for n in layers if n not in kept]:
        raise ConfigError(
            f"{KEY}.layers={layers}: this version of vggt does not keep layer {gone[0]}; choose "
            f"among {', '.join(map(str, kept))}"
        )
