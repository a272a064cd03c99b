"""Faults in a real run: wherever it is struck, it ends as if nothing had been."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
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

TWO = ("cluster.device=cpu", "cluster.nproc_per_node=2", "data.batch_size=2")
HEAVY = ("model._target_=own_parts.Heavy", "+model.ballast=4", "trainer.keep=1")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to; with dropout, noise in the data, EMA and accumulation."""
    outputs = tmp_path_factory.mktemp("undisturbed")
    train(*quick(outputs))
    return only_run(outputs)


def assert_twins(one: Path, other: Path) -> None:
    assert points(one) == points(other)
    assert lines(one / "samples.jsonl") == lines(other / "samples.jsonl")
    ours, theirs = weights(one), weights(other)
    ours["model"].pop("ballast", None)
    assert same(ours, theirs)
    assert status(one)["state"] == "finished" and status(one)["reason"] == status(other)["reason"]


def until(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 60) -> Any:
    """Wait for `condition` while `process` lives; what it gave."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "this took too long"
        time.sleep(0.001)
    return found


def killed_when(
    outputs: Path, condition: Callable[[], Any], *arguments: str, delay: float = 0
) -> None:
    """Start a run and kill it `delay` seconds after `condition`; it must not have ended by itself."""
    process = start(*quick(outputs, *arguments))
    until(condition, process)
    time.sleep(delay)
    family = psutil.Process(process.pid).children(recursive=True)
    kill(process)
    assert process.returncode == -signal.SIGKILL
    psutil.wait_procs(family, timeout=10)


def in_journal(outputs: Path, step: int) -> bool:
    """Whether a run below `outputs` has recorded `step`."""
    return any(
        f'{{"step": {step},' in path.read_text() for path in outputs.glob("*/*/metrics.jsonl")
    )


def checkpoint(outputs: Path, step: int) -> bool:
    return any(outputs.glob(f"*/*/checkpoints/{step:08d}"))


STRUCK: dict[str, tuple[Callable[[Path], Any], float, tuple[str, ...]]] = {
    # Where: what to wait for, how long after it, and what makes it last.
    "first step": (lambda o: any(o.glob("*/*/metrics.jsonl")), 0.05, ("model.pause=0.1",)),
    "validation": (lambda o: checkpoint(o, 5), 0.4, ("+data.val.delay=0.08",)),
    "before the save": (lambda o: any(o.glob("*/*/checkpoints/.tmp-00000005")), 0.0, HEAVY),
    "save": (lambda o: any(o.glob("*/*/checkpoints/.tmp-00000010/state.pt")), 0.004, HEAVY),
    "after the save": (lambda o: checkpoint(o, 10), 0.0, (*HEAVY, "trainer.save_interval=10")),
    "last step": (
        lambda o: checkpoint(o, 23),
        0.03,
        ("trainer.save_interval=1", "model.pause=0.03"),
    ),
    "last validation": (
        lambda o: checkpoint(o, 23),
        0.3,
        ("trainer.save_interval=1", "trainer.val_interval=null", "+data.val.delay=0.1"),
    ),
}


@pytest.mark.parametrize("where", STRUCK)
def test_killed(tmp_path: Path, undisturbed: Path, where: str) -> None:
    ready, delay, slow = STRUCK[where]
    killed_when(tmp_path, lambda: ready(tmp_path), *slow, delay=delay)
    train(*quick(tmp_path, *slow))
    run = only_run(tmp_path)
    assert status(run)["restarts"] == 1
    if "trainer.val_interval=null" in slow:
        assert same(weights(run)["model"], weights(undisturbed)["model"])
        assert lines(run / "samples.jsonl") == lines(undisturbed / "samples.jsonl")
    else:
        assert_twins(run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["validation", "save", "last step"])
@pytest.mark.parametrize("ranks, workers", [(2, 0), (2, 1), (4, 0), (8, 0)])
def test_killed_with_ranks_and_workers(
    tmp_path: Path, where: str, ranks: int, workers: int
) -> None:
    many = (
        "cluster.device=cpu",
        f"cluster.nproc_per_node={ranks}",
        "data.batch_size=2",
        f"data.workers={workers}",
    )
    train(*quick(tmp_path / "twin", *many))
    ready, delay, slow = STRUCK[where]
    outputs = tmp_path / "killed"
    killed_when(outputs, lambda: ready(outputs), *many, *slow, delay=delay)
    train(*quick(outputs, *many, *slow))
    assert_twins(only_run(outputs), only_run(tmp_path / "twin"))


def test_killed_before_an_early_stop(tmp_path: Path) -> None:
    early = ("trainer.val_interval=2", "trainer.patience=2", "optim.lr=1e-9", "seed=4")
    train(*quick(tmp_path / "twin", *early))
    twin = only_run(tmp_path / "twin")
    assert status(twin)["state"] == "finished" and status(twin)["step"] < 24
    outputs = tmp_path / "killed"
    slow = (*early, "model.pause=0.03", "trainer.save_interval=1")
    killed_when(outputs, lambda: checkpoint(outputs, 3), *slow)
    train(*quick(outputs, *slow))
    assert_twins(only_run(outputs), twin)


@pytest.fixture(scope="module")
def two_undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two ranks, which draw other dropout."""
    outputs = tmp_path_factory.mktemp("two")
    train(*quick(outputs, *TWO))
    return only_run(outputs)


@pytest.mark.parametrize(
    "ranks, workers",
    [
        (1, 0),
        pytest.param(1, 1, marks=pytest.mark.slow),
        pytest.param(2, 0, marks=pytest.mark.slow),
        (2, 1),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_asked_to_stop_while_data_is_waited_for(
    tmp_path: Path, request: pytest.FixtureRequest, split: str, ranks: int, workers: int
) -> None:
    """One rank waits; the others, which have their data, leave with it."""
    twin = request.getfixturevalue("undisturbed" if ranks == 1 else "two_undisturbed")
    flag = tmp_path / "flag"
    flag.touch()
    stuck = (f"data.{split}._target_=own_parts.Stuck", f"+data.{split}.flag={flag}")
    many = TWO if ranks > 1 else ()
    arguments = quick(
        tmp_path / "o", *stuck, *many, f"data.workers={workers}", "trainer.save_interval=1"
    )
    process = start(*arguments)
    until(flag.with_suffix(".reached").exists, process)
    until(lambda: any((tmp_path / "o").glob("*/*/checkpoints/[0-9]*")), process)
    time.sleep(0.3)
    began = time.monotonic()
    said = kill(process, signal.SIGTERM)
    assert process.returncode == 75 and time.monotonic() - began < 5, said
    run = only_run(tmp_path / "o")
    stopped = status(run)
    assert stopped["state"] == "killed" and unnamed(stopped["reason"], "SIGTERM") == []
    assert checkpoint(tmp_path / "o", stopped["step"])
    flag.unlink()
    train(*arguments)
    assert_twins(run, twin)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("split", [pytest.param("train", marks=pytest.mark.slow), "val"])
def test_the_time_is_over_while_data_is_waited_for(
    tmp_path: Path, request: pytest.FixtureRequest, split: str, ranks: int
) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    stuck = (f"data.{split}._target_=own_parts.Stuck", f"+data.{split}.flag={flag}")
    arguments = quick(tmp_path / "o", *stuck, *(TWO if ranks > 1 else ()))
    train(*arguments, "trainer.max_time=0.1", code=75)
    run = only_run(tmp_path / "o")
    assert status(run)["state"] == "killed"
    assert unnamed(status(run)["reason"], "trainer.max_time=0.1") == []
    flag.unlink()
    train(*arguments)
    assert_twins(run, request.getfixturevalue("undisturbed" if ranks == 1 else "two_undisturbed"))


def test_asked_to_stop_in_validation(tmp_path: Path, undisturbed: Path) -> None:
    arguments = quick(tmp_path, "+data.val.delay=0.1", "trainer.save_interval=5")
    process = start(*arguments)
    until(lambda: checkpoint(tmp_path, 5), process)
    time.sleep(0.4)
    began = time.monotonic()
    said = kill(process, signal.SIGTERM)
    assert process.returncode == 75 and time.monotonic() - began < 4, said
    run = only_run(tmp_path)
    assert status(run)["step"] == 8 and "val/loss" not in status(run)["last"]
    train(*arguments)
    assert_twins(run, undisturbed)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
    "left",
    [
        pytest.param(2_000_000, id="no room for the save"),
        pytest.param(0, id="no room at all", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk(tmp_path: Path, undisturbed: Path, left: int) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        arguments = quick(disk, *HEAVY, "model.pause=0.1")
        process = start(*arguments)
        run = wait_for_step(disk, 5)
        time.sleep(0.3)  # the save has ended, the next one is to come
        fill(disk, left)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 1, said
        assert unnamed(said, run / "checkpoints", os.strerror(errno.ENOSPC), "MB") == [], said
        assert "Traceback" not in said
        assert [p.name for p in sorted((run / "checkpoints").glob("[0-9]*"))] == ["00000005"]
        if left:
            assert status(run)["state"] == "failed" and "state.pt" in status(run)["reason"]
        (disk / "filler").unlink()
        train(*arguments)
        assert_twins(run, undisturbed)


def fill(disk: Path, left: int) -> None:
    """Fill the file system of `disk` but for `left` bytes."""
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    if left:
        os.truncate(disk / "filler", (disk / "filler").stat().st_size - left)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_same_run_started_twice_at_once(tmp_path: Path, ranks: int) -> None:
    arguments = quick(
        tmp_path, "cluster.device=cpu", f"cluster.nproc_per_node={ranks}", "model.pause=0.1"
    )
    both = [start(*arguments) for _ in range(2)]
    said = [process.communicate(timeout=100)[0] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 1], said
    loser = said[codes.index(1)]
    run = only_run(tmp_path)
    assert unnamed(loser, run, status(run)["pid"], status(run)["host"]) == [], loser
    assert "Traceback" not in loser, loser
    assert status(run)["state"] == "finished" and not (run / "logs" / "failure.json").exists()
    assert points(run) and len(lines(run / "samples.jsonl")) == 24


@pytest.mark.slow
def test_a_tracking_server_that_is_killed_and_comes_back(tmp_path: Path) -> None:
    from test_sync import Server

    from atlas.record.shipping.mlflow_store import MlflowClient

    server = Server(tmp_path)
    server.wait()
    arguments = quick(
        tmp_path / "o",
        "tracking=mlflow",
        f"tracking.uri={server.uri}",
        "model.pause=0.02",
        "trainer.steps=400",
    )
    process = start(*arguments)
    for step in (40, 200):
        wait_for_step(tmp_path / "o", step)
        server.kill()
        time.sleep(2)
        server.start()
        server.wait()
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    run = only_run(tmp_path / "o")
    wanted = {at: value for at, value in points(run).items() if at[1] != "time"}
    assert {step for step, _ in wanted} >= set(range(400))
    client = MlflowClient(tracking_uri=server.uri)
    found: dict[tuple[int, str], float] = {}
    name = status(run)["mlflow_run_id"]
    for key in client.get_run(name).data.metrics:
        for point in client.get_metric_history(name, key):
            assert (point.step, key) not in found
            found[point.step, key] = point.value
    assert wanted.items() <= found.items()
    server.kill()
