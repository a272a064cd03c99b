"""A sample that cannot be read or is not finite: named, or skipped the same way every time."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import (
    kill,
    lines,
    only_run,
    points,
    quick,
    same,
    start,
    status,
    train,
    unnamed,
    wait_for_step,
    weights,
)

from atlas.errors import BadSampleError
from atlas.run.directory import Run
from atlas.training.feeding.stream import Fetcher, TrainStream, ValidationStream
from atlas.training.feeding.workers import ending
from atlas.training.ranks.world import World
from atlas.training.trainer import Trainer, TrainState

ALONE = World(0, 0, 1, torch.device("cpu"))
HOLES = (
    "data.train._target_=own_parts.Holes",
    "data.val._target_=own_parts.Holes",
    "+data.train.nan=[3,7]",
    "+data.train.torn=[9]",
    "+data.val.nan=[3]",
)


class Spoilt:
    """Samples that are their own number; some are NaN, some cannot be read."""

    def __init__(self, length=20, nan=(), torn=()):
        self.length, self.nan, self.torn = length, set(nan), set(torn)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.torn:
            raise OSError("too short")
        return {"x": torch.tensor(float("nan") if index in self.nan else float(index))}


class Whole(Spoilt):
    """The same, asked for whole batches."""

    def batch(self, ids):
        return {"x": torch.stack([self[int(i)]["x"] for i in ids])}


@pytest.mark.parametrize("kind", [Spoilt, Whole])
def test_what_cannot_be_read_is_named(kind):
    fetcher = Fetcher(kind(torn=[4]), 0)
    with pytest.raises(BadSampleError) as raised:
        fetcher.fetch(np.array([3, 4, 5]), [0, 1, 2])
    assert unnamed(str(raised.value), 4, kind.__name__, "OSError: too short") == []


@pytest.mark.parametrize("kind", [Spoilt, Whole])
def test_without_skip_the_numbers_are_not_looked_at(kind):
    ids, batch = Fetcher(kind(nan=[4]), 0).good(np.array([3, 4]), [0, 1], refill=True)
    assert ids.tolist() == [3, 4] and batch["x"].isnan().tolist() == [False, True]


@pytest.mark.parametrize("kind", [Spoilt, Whole])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size, ranks, accumulate", [(4, 1, 1), (1, 2, 2), (2, 2, 1)])
def test_the_same_replacement_however_it_is_cut(kind, workers, size, ranks, accumulate):
    data = kind(nan=[4, 11], torn=[5])
    seen, replaced = [], 0
    for step in range(5):
        parts = {}
        for rank in range(ranks):
            world = World(rank, rank, ranks, torch.device("cpu"))
            stream = TrainStream(
                data,
                seed=0,
                batch_size=size,
                accumulate=accumulate,
                workers=workers,
                world=world,
                on_bad="skip",
            )
            with ending(stream.iterate(step, step + 1)) as batches:
                for micro, (ids, batch) in enumerate(batches):
                    assert batch["x"].tolist() == [float(i) for i in ids]
                    parts[micro * ranks + rank] = batch["x"].tolist()
                    replaced += stream.replaced(step, micro, ids)
        seen.append([value for part in sorted(parts) for value in parts[part]])
    whole = TrainStream(
        data, seed=0, batch_size=4, accumulate=1, workers=0, world=ALONE, on_bad="skip"
    )
    assert seen == [whole[step, 0][1]["x"].tolist() for step in range(5)]
    assert replaced == 3 and not {4.0, 5.0, 11.0} & {x for step in seen for x in step}


@pytest.mark.parametrize("kind", [Spoilt, Whole])
def test_validation_leaves_them_out(kind):
    stream = ValidationStream(
        kind(length=6, nan=[0], torn=[2, 3]),
        seed=0,
        batch_size=2,
        workers=0,
        batches=None,
        world=ALONE,
        on_bad="skip",
    )
    found = [(count, batch and batch["x"].tolist()) for _, count, batch in stream]
    assert found == [(1, [1.0]), (0, None), (2, [4.0, 5.0])]


def test_where_all_are_bad_it_is_an_error(caplog):
    fetcher = Fetcher(Spoilt(nan=range(20)), 0, "skip")
    with caplog.at_level(logging.ERROR), pytest.raises(BadSampleError) as raised:
        fetcher.good(np.array([1]), [0], refill=True)
    assert unnamed(str(raised.value), "data.on_bad=skip", 100, "sample 1") == []


def test_a_validation_of_nothing_is_not_the_best(tmp_path):
    nothing = ("data.val._target_=own_parts.Holes", "data.val.samples=3", "+data.val.nan=[0,1,2]")
    train(*quick(tmp_path, *nothing, "+data.on_bad=skip", "trainer.steps=8"))
    run = only_run(tmp_path)
    assert math.isnan(points(run)[8, "val/loss"])
    assert status(run)["best"] is None and not (run / "checkpoints" / "best").is_symlink()


@pytest.mark.parametrize(
    "losses, best, worse",
    [
        ([0.3, 0.2, 0.4], 0.2, 1),
        ([math.nan, 0.4, math.nan, 0.3], 0.3, 0),
        ([0.4, -math.inf, math.inf], 0.4, 2),
        ([math.nan, math.nan], None, 2),
    ],
)
def test_what_is_not_finite_is_never_the_best(losses, best, worse):
    trainer = SimpleNamespace(state=TrainState())
    for loss in losses:
        Trainer._judge(trainer, loss)
    assert (trainer.state.best and trainer.state.best["value"]) == best
    assert trainer.state.worse == worse


def test_the_run_that_stops_names_sample_and_row(tmp_path):
    done = train(*quick(tmp_path, *HOLES[:3], "data.train.nan=[7]"), code=1)
    assert unnamed(done.stderr, "sample 7", "Holes (line.csv, row 8)", "x") == []
    assert Run(only_run(tmp_path)).read_failure()["kind"] == "NaN"


@pytest.mark.parametrize("workers", [0, 2])
def test_the_run_that_cannot_read_ends_and_names_it(tmp_path, workers):
    done = train(*quick(tmp_path, *HOLES, f"data.workers={workers}"), code=1)
    words = "OSError: the file ends too early"  # which are the data set's
    assert unnamed(done.stderr, "sample 9", "Holes (line.csv, row 10)", words) == []
    assert "Traceback" in done.stderr
    assert Run(only_run(tmp_path)).read_failure()["kind"] == "crash"


def test_skipped_samples_are_counted_and_resume_exactly(tmp_path):
    twin = quick(tmp_path / "twin", *HOLES, "+data.on_bad=skip")
    train(*twin)
    arguments = quick(
        tmp_path / "killed", *HOLES, "+data.on_bad=skip", "data.workers=2", "model.pause=0.02"
    )
    process = start(*arguments)
    wait_for_step(tmp_path / "killed", 10)
    kill(process)
    train(*arguments)
    one, other = only_run(tmp_path / "twin"), only_run(tmp_path / "killed")
    assert points(one) == points(other) and same(weights(one), weights(other))
    counts = [line["bad_samples"] for line in lines(one / "metrics.jsonl") if "bad_samples" in line]
    # 24 updates of 8 samples of 50: just short of four epochs, each with three bad ones.
    assert counts[0] <= 3 and sorted(counts) == counts and 9 <= counts[-1] <= 12
    log = (one / "logs" / "rank0.log").read_text()
    assert unnamed(log, "sample 3", "Holes (line.csv, row 4)") == []
