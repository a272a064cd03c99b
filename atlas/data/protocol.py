"""What a data set offers: `Dataset` is required, every other protocol here is optional.

A data set of your own need not inherit from these classes; having the members is enough. Inherit from
them to let an editor complete names and a type checker compare signatures. Sizes in the shapes: B
samples of a batch, V cameras, H x W pixels, K states of the history, S entries of a state, T actions of
a chunk, A entries of an action.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from atlas.errors import ConfigError
from atlas.protocol import missing, offers

if TYPE_CHECKING:
    from torch import Tensor

Ids = NDArray[np.int64]
# From a collated batch of observations to chunks of actions [B, T, A], float32 on the CPU.
Act = Callable[[Mapping[str, Any]], "Tensor"]


class Dataset(Protocol):
    """A map-style data set: an index is the id of a sample.

    Atlas seeds the generators of Python, numpy and torch from a sample's position in the stream
    before it reads the sample, so random augmentation is the same in a resumed run and for any
    number of data workers.
    """

    def __len__(self) -> int:
        """Return the number of samples, which stays the same throughout a run."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Return sample `index`: tensors, arrays, numbers, text, and mappings or lists of these.

        For `model=vla`: `images` uint8 [V, 3, H, W], `state` [K, S], `instruction` (text),
        `actions` [T, A] in their own units and `action_mask` [T], False past the episode's end.
        """
        ...


class Collates(Protocol):
    """A data set with its own way to collate samples."""

    def collate(self, samples: list[Any], /) -> Any:
        """Return the batch of `samples`, in place of torch's `default_collate`."""
        ...


class ReadsBatches(Protocol):
    """A data set that reads a whole batch faster than sample by sample."""

    def batch(self, ids: Sequence[int] | Ids, seeds: Sequence[int] | None = None, /) -> Any:
        """Return the collated batch of the samples `ids`.

        All batches of an update are read before the update begins, so they must not share memory.
        `seeds`: one seed a sample for random augmentation; a method without this second parameter
        is called with the ids only.
        """
        ...


class Prepares(Protocol):
    """A data set with work to do before training, such as decoding videos into a cache."""

    def prepare(self) -> None:
        """Do this work. It is called once on every rank, before data workers start."""
        ...


class Describes(Protocol):
    """A data set that knows where its samples were recorded."""

    def describe(self, index: int, /) -> str:
        """Return file and row (or the like) of sample `index`, for messages about it."""
        ...


class HasSpec(Protocol):
    """A data set that describes itself for the model.

    `spec` holds plain values (numbers, text, lists, mappings). It is passed to a model whose
    constructor takes `spec`, and is saved in every checkpoint, so that a policy can be loaded without
    the data. `model=vla` reads `cameras` (V names), `image_size` [H, W], `state_dim` S, `history` K,
    `action_dim` A, `horizon` T, `vocabulary` (words), `relative`, `statistics` and optionally
    `discrete`.
    """

    spec: Mapping[str, Any] | None


class HasBaselines(Protocol):
    """A validation set that knows the error of predictions without learning."""

    def baselines(self, train: Any, /) -> Mapping[str, float]:
        """Return the mean absolute error of each baseline by name; some are fitted on `train`.

        A validation tracks `val/l1` divided by each of them as `val/l1_vs_<name>`.
        """
        ...


class HasScenes(Protocol):
    """A validation set in whose scenes a policy can act."""

    scenes: int  # how many there are; 0 for none

    def rollout(self, policy: Act, scenes: Sequence[int], /) -> Mapping[str, NDArray[Any]]:
        """Return outcomes by name, one value a scene, of `policy` acting in `scenes`.

        A validation tracks the mean over all scenes as `val/<name>`. Ranks share the scenes.
        """
        ...


class HasRolloutBaselines(Protocol):
    """A validation set that knows the outcomes of acting without a policy."""

    def rollout_baselines(
        self, scenes: Sequence[int], /
    ) -> Mapping[str, Mapping[str, NDArray[Any]]]:
        """Return, by the baseline's name, the same outcomes as `HasScenes.rollout`."""
        ...


class HasEpisodes(Protocol):
    """A data set that knows which samples follow each other.

    `episode`: int [len(data)], the place of the episode that each sample belongs to.
    """

    episode: NDArray[Any]


class HasRecordedEpisodes(Protocol):
    """A data set whose episodes are numbered in the recordings.

    `episodes[place]` is the number in the recordings of the episode at `place`.
    """

    episodes: list[int]


class NamesActions(Protocol):
    """A data set that names the A entries of an action, for the tables of `atlas evaluate`."""

    action_names: Sequence[str]


class ReadsBlocks(Protocol):
    """A data set that reads states and actions without images."""

    def blocks(self) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
        """Yield `state` [B, K, S], `actions` [B, T, A] and `action_mask` [B, T] of all samples."""
        ...


class HasFrames(Protocol):
    """A data set whose images can be replaced by cached features of a frozen vision.

    Frames are grouped in blocks, such as episodes. `augments`: whether images are changed at random,
    in which case features cannot be cached. `batch` must also accept `images=False`, which leaves the
    images out.
    """

    augments: bool

    def image_blocks(self) -> list[tuple[str, int]]:
        """Return a unique name, determined by the pixels, and the number of frames of each block."""
        ...

    def block_images(self, block: int, start: int, stop: int, /) -> Tensor:
        """Return frames `start` to `stop` of a block, uint8 [stop - start, V, 3, H, W]."""
        ...

    def image_places(self, ids: Sequence[int] | Ids, /) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the block and the frame inside it of each sample's images, int [B] each."""
        ...


def spec_of(data: Any) -> Any:
    """Return the `spec` of a data set, None if it has none."""
    return data.spec if offers(data, HasSpec) else None


def scenes_of(data: Any) -> int:
    """Return the number of scenes of a data set, 0 if it has none.

    Raise `ConfigError` if it counts scenes but cannot play them.
    """
    absent = missing(data, HasScenes)
    if "scenes" in absent or not data.scenes:
        return 0
    if absent:
        raise ConfigError(
            f"data.val: {type(data).__name__} has scenes={data.scenes} but no method "
            "`rollout(policy, scenes)`; add it, or set scenes to 0"
        )
    return int(data.scenes)
