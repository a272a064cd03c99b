"""What a frozen vision makes of the data's images, computed once and kept on disk in float16.

A data set takes part that says which frames its images are (`image_blocks`, `block_images`,
`image_places`) and can leave them out of a batch (`batch(…, images=False)`); a model, whose
`vision` can `encode` images and has a `fingerprint`, and which takes `features` in their place.
A block of frames (an episode) is a file: what an interrupted run has finished stands, and ranks,
runs and sweeps share it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from atlas.data.arrays import cache_folder, is_ready, open_array, write_array
from atlas.data.protocol import HasFrames
from atlas.errors import ConfigError
from atlas.models.protocol import Encodes, HasVision
from atlas.protocol import missing, offers
from atlas.system.files import claimed, digest_of_json, digest_of_parts, free_bytes, write_json
from atlas.training.optimization.precision import autocast

log = logging.getLogger("atlas")

HALF = np.dtype(np.float16)
FORMAT = 1  # of the files; another one is another key
FRAMES = 16  # that go through the vision at once
LOG_EVERY = 10.0  # seconds between two lines about a long computation
KEY = "data.cache_features=true"
OFF = "set data.cache_features=false"


def check(model: nn.Module, data: Sequence[Any]) -> None:
    """Raise `ConfigError` where features that are kept would be wrong, or cannot be had.

    `model` with what is frozen frozen; `data`: the training set and, where there is one, the
    validation set.
    """
    problems = [*_wrong_model(model), *(p for part in data for p in _wrong_data(part))]
    if problems:
        raise ConfigError([f"{KEY}: {problem}, or {OFF}" for problem in dict.fromkeys(problems)])


def attach(parts: Any, precision: str, device: torch.device) -> None:
    """Let the data sets of `parts` give features in place of images.

    To be called once the model has the weights that it trains with. Computes what is not there
    yet; several processes share the work.
    """
    cache = FeatureCache(
        parts.model.vision.to(device),  # a model that is to be cut over ranks is not there yet
        {"precision": precision, "device": device.type},
        autocast(precision, device),
        device,
    )
    data = [part for part in (parts.train, parts.val) if part is not None]
    cache.fill(data)
    parts.train = cache.over(parts.train)
    parts.val = None if parts.val is None else cache.over(parts.val)


@dataclass
class FeatureCache:
    """The output of `vision`, a file a block of frames, float16 [frames, V, P, C].

    `computed`: plain values that, beside the weights and the fingerprint, tell how it is computed.
    """

    vision: Any
    computed: Mapping[str, Any]
    autocast: contextlib.AbstractContextManager[Any]
    device: torch.device

    def __post_init__(self) -> None:
        self.vision.eval()  # frozen, so for good
        self.identity = {
            "format": FORMAT,
            "weights": weights_digest(self.vision),
            "fingerprint": self.vision.fingerprint(),
            **self.computed,
        }
        self.folder = cache_folder("features") / digest_of_json(self.identity)[:16]
        self._patches = (int(np.prod(self.vision.grid)), int(self.vision.width))

    def file(self, block: str, views: int, size: Sequence[int]) -> Path:
        """Where the features of the frames are that `block` tells from all others."""
        return self.folder / f"{digest_of_json([block, views, list(size)])[:16]}.npy"

    def over(self, data: Any) -> CachedFeatures:
        """`data` with features in place of images."""
        return CachedFeatures(data, [block.file for block in self._blocks(data)])

    def fill(self, data: Sequence[Any]) -> None:
        """Compute what is not there; any number of processes may do so at once."""
        blocks = {block.file: block for part in data for block in self._blocks(part)}
        todo = [block for block in blocks.values() if not block.ready]
        log.info("features: %d of %d blocks are there", len(blocks) - len(todo), len(blocks))
        if not todo:
            return
        self._make_folder(sum(block.bytes for block in todo))
        progress = _Progress(len(todo))
        # First what no other process is at, so that several share the work; then wait for theirs.
        for wait in (False, True):
            todo = [block for block in todo if not self._fill_one(block, wait, progress)]
        progress.end()

    def _blocks(self, data: Any) -> list[Block]:
        views, size = len(data.spec["cameras"]), data.spec["image_size"]
        return [
            Block(data, number, self.file(name, views, size), (frames, views, *self._patches))
            for number, (name, frames) in enumerate(data.image_blocks())
        ]

    def _fill_one(self, block: Block, wait: bool, progress: _Progress) -> bool:
        """False where another process is at it and `wait` is not set."""
        try:
            with claimed(block.file.with_suffix(".lock"), wait) as mine:
                if mine and not block.ready:
                    write_array(block.file, block.shape, HALF, self._encoded(block))
                    progress.add(block.shape[0])
                return mine
        except OSError as error:
            raise ConfigError(self._unwritable(error)) from error

    @torch.no_grad()
    def _encoded(self, block: Block) -> Iterator[np.ndarray[Any, Any]]:
        for start in range(0, block.shape[0], FRAMES):
            stop = min(start + FRAMES, block.shape[0])
            images = block.data.block_images(block.number, start, stop).to(self.device)
            with self.autocast:
                features = self.vision.encode(images)
            half = features.half().cpu().numpy()
            if half.shape[1:] != block.shape[1:]:
                raise ConfigError(
                    f"{KEY}: {type(self.vision).__name__}.encode gives {list(half.shape[1:])} a "
                    f"frame, its grid and width say {list(block.shape[1:])}; correct it, or {OFF}"
                )
            if not np.isfinite(half).all():
                raise ConfigError(
                    f"{KEY}: features of {type(self.vision).__name__} are not finite, or beyond "
                    f"what float16 holds (65504); {OFF}"
                )
            yield half

    def _make_folder(self, needed: int) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "identity.json", self.identity, default=str)
            free = free_bytes(self.folder)
        except OSError as error:
            raise ConfigError(self._unwritable(error)) from error
        log.info("features: %.2f GB into %s, once", needed / 1e9, self.folder)
        if needed > free:
            raise ConfigError(
                f"{KEY}: needs {needed / 1e9:.1f} GB in {self.folder}, where {free / 1e9:.1f} are "
                f"free; name a larger disk in ATLAS_CACHE, pool to a coarser model.vision.grid, "
                f"or {OFF}"
            )

    def _unwritable(self, error: OSError) -> str:
        return (
            f"{KEY}: cannot write to {self.folder} ({error.strerror}); name a folder that is "
            f"writable and has room in ATLAS_CACHE, or {OFF}"
        )


@dataclass(frozen=True)
class Block:
    """Frames number 0 to `shape[0]` of block `number` of `data`, and the file of their features."""

    data: Any
    number: int
    file: Path
    shape: tuple[int, int, int, int]

    @property
    def ready(self) -> bool:
        return is_ready(self.file, self.shape, HALF)

    @property
    def bytes(self) -> int:
        return HALF.itemsize * int(np.prod(self.shape))


class CachedFeatures:
    """`data` with `features`, float16 [B, V, P, C], in its batches, in place of `images`.

    Whatever else `data` offers, this offers too.
    """

    def __init__(self, data: Any, files: list[Path]) -> None:
        self.data = data
        self._files = files

    def __len__(self) -> int:
        return len(self.data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = self.batch([range(len(self))[index]])
        return {key: value[0] for key, value in batch.items()}

    def batch(self, ids: Sequence[int], seeds: Sequence[int] | None = None) -> dict[str, Any]:
        """The samples `ids`, collated."""
        batch: dict[str, Any] = self.data.batch(ids, seeds, images=False)
        batch["features"] = self._features(ids)
        return batch

    def _features(self, ids: Sequence[int]) -> Tensor:
        places = zip(*(part.tolist() for part in self.data.image_places(ids)), strict=True)
        rows = [open_array(self._files[block])[frame] for block, frame in places]
        return torch.from_numpy(np.stack(rows))


class _Progress:
    """Says how far it is, every LOG_EVERY seconds, and how long it took."""

    def __init__(self, blocks: int) -> None:
        self.blocks, self.done, self.frames = blocks, 0, 0
        self.start = self.said = time.monotonic()

    def add(self, frames: int) -> None:
        self.done += 1
        self.frames += frames
        if time.monotonic() - self.said > LOG_EVERY:
            self.said = time.monotonic()
            log.info("features: %d of %d blocks computed", self.done, self.blocks)

    def end(self) -> None:
        seconds = time.monotonic() - self.start
        log.info("features: computed of %d frames in %.1f s", self.frames, seconds)


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of the names, types, shapes and bytes of a module's state."""
    return digest_of_parts(
        part for item in sorted(module.state_dict().items()) for part in _parts(*item)
    )


def _parts(name: str, value: Tensor) -> Iterator[Any]:
    yield f"{name} {value.dtype} {list(value.shape)};".encode()
    # As bytes: numpy knows no bfloat16.
    plain = value.detach().cpu().contiguous().reshape(-1)
    if plain.numel():
        yield plain.view(torch.uint8).numpy()


def _wrong_model(model: nn.Module) -> Iterator[str]:
    vision = model.vision if offers(model, HasVision) else None
    lacking = missing(vision, Encodes)
    if not isinstance(vision, nn.Module) or lacking:
        what = "no module `vision`" if vision is None else f"a vision without {', '.join(lacking)}"
        yield (
            f"{type(model).__name__} has {what}, so its output cannot be kept; give it one as "
            "atlas.models.vision.VisionEncoder is"
        )
    elif any(parameter.requires_grad for parameter in vision.parameters()):
        yield (
            "the vision is trained, so what it makes of an image changes with every update; "
            "freeze it with optim.lr_multipliers.vision=0"
        )


def _wrong_data(data: Any) -> Iterator[str]:
    lacking = missing(data, HasFrames)
    if lacking:
        yield (
            f"{type(data).__name__} does not say which frames its images are ({lacking[0]} is "
            "lacking); use a data set that does, such as data=lerobot"
        )
    elif data.augments:
        yield (
            "augmentation changes the images of every sample anew; switch it off "
            "(data.augment.crop=0 data.augment.colour=0, on the table top data.train.augment=0)"
        )
