"""Which samples an update sees: a function of the seed and the position in the stream alone."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset, default_collate

from atlas.data.protocol import Collates, Dataset, ReadsBatches
from atlas.errors import ConfigError
from atlas.protocol import offers
from atlas.training.feeding import bad_samples as bad
from atlas.training.feeding.randomness import mix, sample_seeds
from atlas.training.feeding.workers import answers
from atlas.training.ranks.world import World

Ids = npt.NDArray[np.int64]
Batch = Any
T = TypeVar("T")


class Order:
    """An endless stream of sample ids: one permutation of all `length` samples an epoch."""

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self._seed = seed
        self._epoch = -1
        self._permutation: Ids = np.empty(0, np.int64)

    def ids(self, start: int, count: int) -> Ids:
        """The ids at positions `start` to `start + count`; they can straddle epochs."""
        epoch, offset = divmod(start, self.length)
        if offset + count <= self.length:
            return self._of_epoch(epoch)[offset : offset + count]
        pieces = []
        while count > 0:
            piece = self._of_epoch(epoch)[offset : offset + count]
            pieces.append(piece)
            epoch, offset, count = epoch + 1, 0, count - len(piece)
        return np.concatenate(pieces)

    def _of_epoch(self, epoch: int) -> Ids:
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64(mix(self._seed, 0, epoch)))
            self._permutation = generator.permutation(self.length)
            self._epoch = epoch
        return self._permutation


class Fetcher:
    """Reads and collates samples of a map-style data set by id and position.

    A data set that has `batch(ids)` or `batch(ids, seeds)` is asked for whole batches. Otherwise it
    is indexed sample by sample, with the global generators of Python, numpy and torch seeded from
    the sample's position, so that its augmentation does not depend on worker processes.

    `on_bad` says what becomes of a sample that cannot be read: "error" (and None) raises `BadSampleError`,
    "skip" takes another one (see `atlas.training.feeding.bad_samples`), also for one with a number in it that is
    not finite. "error" does not look at the numbers: the trainer notices what they do to the loss.
    """

    def __init__(self, dataset: Any, seed: int, on_bad: str | None = None) -> None:
        self.dataset = dataset
        self.skips = on_bad == "skip"
        self._seed = seed
        self._batch: Callable[..., Batch] | None = (
            dataset.batch if offers(dataset, ReadsBatches) else None
        )
        self._takes_seeds = self._batch is not None and _arguments(self._batch) > 1
        self._collate = dataset.collate if offers(dataset, Collates) else default_collate

    def fetch(self, ids: Ids, positions: Sequence[int] | Ids) -> Batch:
        """The collated batch of `ids`, which stand at `positions` of the stream."""
        try:
            return self._read(ids, positions)
        except Exception as error:
            bad.tell(self, ids, positions, error)
            raise

    def good(self, ids: Ids, positions: Sequence[int] | Ids, refill: bool) -> tuple[Ids, Batch]:
        """As `fetch`, with the ids that were read: where samples are skipped, these can be others.

        With `refill` a bad sample is replaced, without it is left out; the batch is None where
        nothing is left.
        """
        if not self.skips:
            return ids, self.fetch(ids, positions)
        return bad.skipping(self, ids, positions, refill)

    def one(self, index: int, position: int) -> Batch:
        """A batch of one sample."""
        return self._read(np.array([index]), [position])

    def replacement(self, position: int, attempt: int) -> int:
        """The id to try at `position` in place of one that is bad: of the seed and these alone."""
        return mix(self._seed, 4, position, attempt) % len(self.dataset)

    def _read(self, ids: Ids, positions: Sequence[int] | Ids) -> Batch:
        if self._batch is None:
            return self._collate([self._sample(int(i), int(p)) for i, p in zip(ids, positions)])
        if self._takes_seeds:
            return self._batch(ids, sample_seeds(self._seed, positions))
        return self._batch(ids)

    def _sample(self, index: int, position: int) -> Any:
        seed = mix(self._seed, 1, position)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        torch.default_generator.manual_seed(seed)
        return self.dataset[index]


class TrainStream:
    """The micro-batches of one rank, from update `start` to `steps`, as (ids, batch) pairs.

    The ids are those that were read: where bad samples are skipped, others are in their place.

    Micro-batch m of rank r takes part m * world_size + r of the update's samples, so the update
    sees the same samples however it is cut.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        seed: int,
        batch_size: int,
        accumulate: int,
        workers: int,
        world: World,
        on_bad: str | None = None,
    ) -> None:
        self.order = Order(len(dataset), seed)
        self.effective_batch = batch_size * accumulate * world.size
        self._fetcher = Fetcher(dataset, seed, on_bad)
        self._size = batch_size
        self._accumulate = accumulate
        self._workers = workers
        self._world = world

    def ids(self, step: int) -> list[int]:
        """All sample ids of update `step`, over all ranks."""
        start = step * self.effective_batch
        return [int(i) for i in self.order.ids(start, self.effective_batch)]

    def __getitem__(self, request: tuple[int, int]) -> tuple[Ids, Batch]:
        start = self._start(*request)
        ids = self.order.ids(start, self._size)
        return self._fetcher.good(ids, range(start, start + self._size), refill=True)

    def replaced(self, step: int, micro: int, read: Ids) -> int:
        """How many of the ids that were `read` stand in for bad samples."""
        planned = self.order.ids(self._start(step, micro), self._size)
        return int((np.asarray(read) != planned).sum())  # data workers hand over tensors

    def _start(self, step: int, micro: int) -> int:
        part = micro * self._world.size + self._world.rank
        return step * self.effective_batch + part * self._size

    @property
    def skips(self) -> bool:
        """Whether bad samples are replaced and counted."""
        return self._fetcher.skips

    def blame(self, step: int) -> str | None:
        """The first sample of update `step` that is not finite, in words; reads all of them again."""
        start = step * self.effective_batch
        return bad.first_not_finite(self._fetcher, self.ids(step), start)

    def iterate(self, start: int, steps: int) -> Iterator[tuple[Ids, Batch]]:
        """From update `start` on; read ahead in worker processes where there are any."""

        def requests() -> Iterable[tuple[int, int]]:
            return ((s, m) for s in range(start, steps) for m in range(self._accumulate))

        if self._workers == 0:
            return map(self.__getitem__, requests())
        batches: Iterator[tuple[Ids, Batch]] = answers(
            self, requests, self._workers, self._world.device
        )
        return batches


class ValidationStream:
    """Every sample of a data set once over all ranks, or the first `batches` batches of it."""

    def __init__(
        self,
        dataset: Any,
        *,
        seed: int,
        batch_size: int,
        workers: int,
        batches: int | None,
        world: World,
        on_bad: str | None = None,
    ) -> None:
        chunks = -(-len(dataset) // batch_size)
        self._chunks = range(world.rank, min(chunks, batches or chunks), world.size)
        self._fetcher = Fetcher(dataset, seed, on_bad)
        self._length = len(dataset)
        self._size = batch_size
        self._workers = workers
        self._device = world.device

    def __getitem__(self, chunk: int) -> tuple[int, int, Batch]:
        start = chunk * self._size
        ids = np.arange(start, min(start + self._size, self._length))
        ids, batch = self._fetcher.good(ids, ids, refill=False)
        return chunk, len(ids), batch

    def __iter__(self) -> Iterator[tuple[int, int, Batch]]:
        """(chunk number, samples in it, batch) of this rank."""
        if self._workers == 0:
            return map(self.__getitem__, self._chunks)
        batches: Iterator[tuple[int, int, Batch]] = answers(
            self, lambda: self._chunks, self._workers, self._device
        )
        return batches


def _arguments(function: Callable[..., Any]) -> int:
    return len(inspect.signature(function).parameters)


def check_dataset(dataset: Any, key: str) -> None:
    """Raise `ConfigError` for a data set that is not map-style or is empty."""
    if isinstance(dataset, IterableDataset) or not offers(dataset, Dataset):
        raise ConfigError(
            f"{key}: {type(dataset).__name__} is not a map-style data set; Atlas needs "
            "`len(data)` and `data[i]`, since a sample's index is what lets a run resume exactly"
        )
    if len(dataset) == 0:
        raise ConfigError(f"{key}: {type(dataset).__name__} has no samples")


def to_device(batch: Batch, device: torch.device) -> Batch:
    """`batch` with its tensors on `device`; anything else in it stays as it is."""
    if device.type == "cpu":
        return batch
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
