"""The sample stream: a function of seed and position alone, however it is cut and whoever reads it."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import unnamed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from atlas.errors import ConfigError
from atlas.run import failures
from atlas.training.feeding import workers
from atlas.training.feeding.stream import (
    Fetcher,
    Order,
    TrainStream,
    ValidationStream,
    check_dataset,
)
from atlas.training.ranks.world import World

CPU = torch.device("cpu")
ALONE = World(0, 0, 1, CPU)


class Augmented(Dataset[dict[str, Any]]):
    """Samples with noise from all three global generators."""

    def __init__(self, length: int = 20) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = [random.random(), np.random.rand(), float(torch.rand(()))]
        return {"id": index, "noise": torch.tensor(noise, dtype=torch.float64)}


class Whole:
    """Answers whole batches, and tells what it was asked for."""

    def __init__(self, length: int = 20) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("asked for a single sample")

    def batch(self, ids: Any, seeds: list[int]) -> dict[str, Any]:
        return {"ids": list(ids), "seeds": list(seeds)}


class WholeUnseeded(Whole):
    def batch(self, ids: Any) -> dict[str, Any]:  # type: ignore[override]
        return {"ids": list(ids)}


class StuckOnce:
    """Has the first child that is forked while `flag` is there wait for ever, in the fork."""

    flag: Path | None = None

    @classmethod
    def after_fork(cls) -> None:
        if cls.flag and cls.flag.exists():
            cls.flag.unlink()
            time.sleep(1000)


os.register_at_fork(after_in_child=StuckOnce.after_fork)


def test_a_data_worker_that_does_not_start_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a child of a process with threads is stuck now and then, before Python 3.12."""
    flag = tmp_path / "flag"
    monkeypatch.setattr(StuckOnce, "flag", flag)
    monkeypatch.setattr(workers, "START_S", 1.0)
    found = []
    stream = TrainStream(Augmented(), seed=1, batch_size=4, accumulate=1, workers=2, world=ALONE)
    for stuck in (False, True):
        if stuck:
            flag.touch()
        with workers.ending(stream.iterate(0, 6)) as batches:
            found.append([batch["noise"] for _, batch in batches])
        assert len(caplog.messages) == stuck and not flag.exists()
        assert not stuck or unnamed(caplog.messages[0], "1 s") == []  # it was waited for that long
    assert len(found[1]) == 6 and all(map(torch.equal, *found))


class Numbers(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(10))


def stream(dataset: Any, *, size=4, accumulate=1, ranks=1, rank=0, seed=0, workers=0):
    world = World(rank, rank, ranks, CPU)
    return TrainStream(
        dataset, seed=seed, batch_size=size, accumulate=accumulate, workers=workers, world=world
    )


@given(length=st.integers(1, 60), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 50))
@settings(max_examples=60, deadline=None, database=None)
def test_every_sample_once_an_epoch(length, seed, epoch):
    ids = Order(length, seed).ids(epoch * length, length)
    assert sorted(ids) == list(range(length))


@given(st.integers(1, 30), st.integers(0, 200), st.integers(0, 100), st.integers(0, 1000))
@settings(max_examples=80, deadline=None, database=None)
def test_any_piece_is_the_piece_of_the_whole(length, start, count, seed):
    whole = Order(length, seed).ids(0, 300)
    order = Order(length, seed)
    order.ids(start + 7, 3)  # what was asked for before does not matter
    assert order.ids(start, count).tolist() == whole[start : start + count].tolist()


def test_epochs_and_seeds_have_other_permutations():
    order = Order(1000, 0)
    first, second = order.ids(0, 1000), order.ids(1000, 1000)
    assert first.tolist() != second.tolist() != Order(1000, 1).ids(0, 1000).tolist()
    assert first.tolist() != sorted(first)


def test_a_batch_straddles_epochs_even_several():
    order = Order(3, 5)
    ids = order.ids(1, 10).tolist()  # 2 of epoch 0, epochs 1 and 2, 2 of epoch 3
    assert [sorted(ids[2:5]), sorted(ids[5:8])] == [[0, 1, 2], [0, 1, 2]]
    assert ids[:2] == order.ids(0, 3).tolist()[1:] and ids[8:] == order.ids(9, 3).tolist()[:2]


def test_one_sample_in_a_large_batch():
    assert Order(1, 0).ids(0, 5000).tolist() == [0] * 5000


CUTS = [(1, 4, 4), (2, 2, 4), (4, 1, 4), (1, 1, 16), (2, 1, 8)]


class Torn:
    """What a data worker has left when SIGKILL, or its own code, has ended it."""

    def __init__(self, error: Exception, number: int) -> None:
        self.error = error
        fork = multiprocessing.get_context("fork")
        self._workers = [fork.Process(target=time.sleep, args=(60,)) for _ in range(2)]
        for worker in self._workers:
            worker.start()
        os.kill(self._workers[1].pid, number)

    def __next__(self) -> None:
        raise self.error


@pytest.mark.parametrize("error", [ConnectionResetError(104), EOFError(), RuntimeError("exited")])
@pytest.mark.parametrize(
    "number, kind", [(signal.SIGKILL, failures.MEMORY), (signal.SIGTERM, failures.CRASH)]
)
def test_a_data_worker_that_was_killed_is_the_error(error, number, kind):
    torn = Torn(error, number)
    with pytest.raises((OSError, EOFError, RuntimeError)) as raised:
        workers.following(torn)
    assert failures.kind_of(raised.value) == kind
    torn._workers[0].kill()


@pytest.mark.parametrize(
    ("ranks", "accumulate", "size", "workers"),
    [*((*cut, 0) for cut in CUTS), *((*cut, 2) for cut in CUTS), (8, 2, 1, 0)],
)
def test_the_update_sees_the_same_samples_however_it_is_cut(ranks, accumulate, size, workers):
    whole = stream(Augmented(), size=16)
    steps = 3  # 48 of 20 samples: straddles epochs
    cut: dict[int, dict[int, Any]] = {step: {} for step in range(steps)}
    for rank in range(ranks):
        mine = stream(
            Augmented(), size=size, accumulate=accumulate, ranks=ranks, rank=rank, workers=workers
        )
        assert mine.effective_batch == 16
        for number, (ids, batch) in enumerate(mine.iterate(0, steps)):
            step, micro = divmod(number, accumulate)
            assert ids.tolist() == batch["id"].tolist()
            cut[step][micro * ranks + rank] = batch
            assert mine.ids(step) == whole.ids(step)
    for step, (ids, batch) in enumerate(whole.iterate(0, steps)):
        parts = [cut[step][part] for part in range(ranks * accumulate)]
        assert torch.cat([p["id"] for p in parts]).tolist() == ids.tolist() == whole.ids(step)
        # augmentation as well, to the bit
        assert torch.equal(torch.cat([p["noise"] for p in parts]), batch["noise"])


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_do_not_matter(workers):
    alone = [batch for _, batch in stream(Augmented()).iterate(0, 12)]
    apart = [batch for _, batch in stream(Augmented(), workers=workers).iterate(0, 12)]
    for one, other in zip(alone, apart, strict=True):
        assert one["id"].tolist() == other["id"].tolist()
        assert torch.equal(one["noise"], other["noise"])
    noise = torch.cat([batch["noise"] for batch in alone])
    assert len(noise.unique()) == noise.numel()  # a sample has other noise in the next epoch


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_taken_up_later_is_the_rest_of_the_stream(workers):
    whole = list(stream(Augmented(), accumulate=2).iterate(0, 9))
    rest = list(stream(Augmented(), accumulate=2, workers=workers).iterate(5, 9))
    assert len(rest) == 8
    for (ids, batch), (same_ids, same) in zip(whole[10:], rest, strict=True):
        assert ids.tolist() == same_ids.tolist() and torch.equal(batch["noise"], same["noise"])


def test_the_seed_makes_the_order_and_the_augmentation():
    (ids, batch), (others, other) = (
        next(stream(Augmented(), seed=s).iterate(0, 1)) for s in (0, 1)
    )
    assert ids.tolist() != others.tolist() and not torch.equal(batch["noise"], other["noise"])


def test_whole_batches_come_with_a_seed_a_position():
    cuts = [(1, 16), (4, 4)]
    taken = []
    for accumulate, size in cuts:
        asked = stream(Whole(), accumulate=accumulate, size=size)
        batches = [batch for _, batch in asked.iterate(0, 3)]
        taken.append([(i, s) for b in batches for i, s in zip(b["ids"], b["seeds"], strict=True)])
    assert taken[0] == taken[1] and len({seed for _, seed in taken[0]}) == 48
    assert all(isinstance(seed, int) and 0 <= seed < 2**63 for _, seed in taken[0])
    # as the seed that a sample of its own is made with
    ids, seeds = zip(*taken[0][:1], strict=True)
    sample = next(stream(Augmented()).iterate(0, 1))[1]
    random.seed(seeds[0])
    assert ids[0] == sample["id"][0] and random.random() == float(sample["noise"][0, 0])


def test_whole_batches_without_seeds():
    ids, batch = next(stream(WholeUnseeded()).iterate(0, 1))
    assert batch == {"ids": ids.tolist()}


def test_a_collate_of_its_own():
    class Own(Augmented):
        def collate(self, samples: list[Any]) -> list[int]:
            return [sample["id"] for sample in samples]

    ids, batch = next(stream(Own()).iterate(0, 1))
    assert batch == ids.tolist()
    assert Fetcher(Own(), 0).fetch(np.array([3, 3]), [0, 1]) == [3, 3]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 0), (3, 0), (8, 0), (1, 1), (2, 1)])
@pytest.mark.parametrize(
    ("length", "size", "batches"),
    [(20, 4, None), (21, 4, None), (3, 8, None), (21, 4, 2), (21, 4, 99)],
)
def test_validation_sees_every_sample_once(ranks, length, size, batches, workers):
    seen: list[int] = []
    for rank in range(ranks):
        mine = ValidationStream(
            Augmented(length),
            seed=0,
            batch_size=size,
            workers=workers,
            batches=batches,
            world=World(rank, rank, ranks, CPU),
        )
        for chunk, count, batch in mine:
            assert chunk % ranks == rank and count == len(batch["id"])
            seen += batch["id"].tolist()
    assert sorted(seen) == list(range(min(length, size * batches if batches else length)))


@pytest.mark.parametrize(
    ("dataset", "needs"),
    [
        (Numbers(), True),
        (iter([1, 2]), True),
        ({}, False),
        (Augmented(0), False),
        (TensorDataset(torch.zeros(0, 2)), False),
    ],
    ids=["iterable", "iterator", "empty dict", "empty", "empty tensors"],
)
def test_what_cannot_be_a_data_set_is_refused_with_what_it_needs(dataset, needs):
    with pytest.raises(ConfigError) as raised:
        check_dataset(dataset, "data.train")
    assert unnamed(str(raised.value), "data.train", type(dataset).__name__) == []
    wanted = ["`len(data)`", "`data[i]`"]
    assert unnamed(str(raised.value), *wanted) == ([] if needs else wanted)


@pytest.mark.parametrize("dataset", [Augmented(1), Whole(1), [1], TensorDataset(torch.zeros(1))])
def test_what_can_be_a_data_set(dataset):
    check_dataset(dataset, "data.train")
