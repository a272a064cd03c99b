"""Weights cut over the ranks: the same run as with whole ones, and the same files."""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import (
    OWN,
    ROOT,
    kill,
    lines,
    only_run,
    quick,
    same,
    start,
    status,
    train,
    unnamed,
    wait_for_step,
    weights,
)
from hydra import compose, initialize_config_dir
from torch import nn
from torch.distributed.fsdp import FSDPModule

from atlas.config.checks import check as check_config
from atlas.errors import ConfigError
from atlas.run.directory import Run
from atlas.run.provenance import Provenance
from atlas.run.signals import Stop
from atlas.training import job
from atlas.training.dry_run import memory, preflight
from atlas.training.optimization.optimizer import freeze, group_parameters
from atlas.training.ranks import sharding
from atlas.training.ranks.world import is_sharded, local_part
from atlas.training.trainer import Trainer
from atlas.training.validation import Validation
from launchers.launch import resolve

FORK = multiprocessing.get_context("fork")  # torch is there already


def config(outputs: Path, *overrides: str) -> dict[str, Any]:
    """A short run of a model with frozen layers, trained ones and buffers."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(
            "config",
            [
                f"hydra.searchpath=[file://{OWN}]",
                *("experiment=quick", "model=stack", "optim=adamw", "cluster.device=cpu"),
                *("trainer.steps=10", "trainer.save_interval=4", "trainer.val_interval=5"),
                *("trainer.keep=9", "trainer.clip_norm=0.05", "trainer.progress=false"),
                *(f"outputs={outputs}", *overrides),
            ],
        )
    return resolve(cfg)


def create(outputs: Path, ranks: int, *overrides: str) -> Run:
    plain = config(outputs, *overrides)
    check_config(plain)
    run = Run.locate(plain, ranks)
    run.create(plain, ranks, Provenance.collect([], [str(OWN)]))
    return run


def begin(run: Run, ranks: int) -> list[Any]:
    """The processes of the ranks, which train `run` as workers do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [FORK.Process(target=as_rank, args=(run, r, ranks, port)) for r in range(ranks)]
    for process in processes:
        process.start()
    return processes


def as_rank(run: Run, rank: int, ranks: int, port: int) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    sys.path.insert(0, str(OWN))
    with Stop() as stop, frozen_stay():
        outcome = job.train(run, run.read_config(), None, stop)
    os._exit(outcome.code)


@contextlib.contextmanager
def frozen_stay() -> Iterator[None]:
    """Raises where training changes this rank's part of what is frozen."""
    before: list[tuple[Any, torch.Tensor]] = []

    def shard(parts: Any, *others: Any) -> Any:
        told = memory.weights(parts.model, int(os.environ["WORLD_SIZE"]))
        cut = sharding.shard(parts, *others)
        fixed = [p for p in parts.model.parameters() if not p.requires_grad]
        assert fixed and all(map(is_sharded, fixed))
        if os.environ["RANK"] == "0":  # which has the largest parts
            held = sum(memory.size(local_part(p)) for p in parts.model.parameters())
            assert held == sum(told.values()) - told["buffers"]
        before.extend((p, local_part(p).clone()) for p in fixed)
        return cut

    job.shard = shard
    yield
    assert all(torch.equal(local_part(p), value) for p, value in before)


def finish(run: Run, ranks: int) -> Run:
    processes = begin(run, ranks)
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0] * ranks
    return run


def close(a: Any, b: Any) -> bool:
    """Equality up to rounding, through dictionaries, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, rel=1e-4) if isinstance(a, float) else bool(a == b)


def shapes(nested: Any) -> Any:
    """What a checkpoint is made of: names, types and sizes, without its numbers."""
    if isinstance(nested, dict):
        return {key: shapes(value) for key, value in nested.items()}
    if isinstance(nested, list | tuple):
        return [*map(shapes, nested)]
    if isinstance(nested, torch.Tensor):
        size = nested.untyped_storage().nbytes()  # of what is written, also for a view
        return type(nested), nested.dtype, nested.shape, size
    return type(nested)


@functools.cache
def finished(folder: Path, ranks: int, *overrides: str) -> Run:
    return finish(create(folder, ranks, *overrides), ranks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharding")


def cut(folder: Path, ranks: int = 2) -> Run:
    return finished(folder / f"cut{ranks}", ranks, "cluster.sharding=fsdp2")


def whole(folder: Path, ranks: int = 2) -> Run:
    return finished(folder / f"whole{ranks}", ranks)


def test_the_same_result_as_with_whole_weights(folder: Path) -> None:
    a, b = cut(folder), whole(folder)
    assert a.id == b.id  # how a run is cut is not what it is
    assert a.checkpoints.joinpath("best").resolve().name == "00000010"
    for step in (4, 5, 8, 10):
        mine, others = (
            torch.load(run.checkpoints / f"{step:08d}" / "state.pt", weights_only=True)
            for run in (a, b)
        )
        assert shapes(mine) == shapes(others)
        assert close(mine, others), step
    assert same(frozen(a), frozen(b)) and frozen(a)


def frozen(run: Run) -> Any:
    return torch.load(run.checkpoints / "frozen" / "state.pt", weights_only=True)["model"]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_killed_and_resumed(folder: Path, tmp_path: Path, ranks: int) -> None:
    run = create(tmp_path, ranks, "cluster.sharding=fsdp2")
    processes = begin(run, ranks)
    wait_for_step(tmp_path, 4)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    finish(run, ranks)
    assert same(weights(run.path), weights(cut(folder, ranks).path))


@pytest.mark.parametrize("first", ["cut", "whole"])
def test_gone_on_with_the_other_way(folder: Path, tmp_path: Path, first: str) -> None:
    sharding = {"cut": "fsdp2", "whole": "null"}
    second = {"cut": "whole", "whole": "cut"}[first]
    run = create(tmp_path, 2, f"cluster.sharding={sharding[first]}")
    finish(run, 2)
    for step in ("00000005", "00000008", "00000010"):
        run.checkpoints.joinpath(step).rename(tmp_path / step)
    text = run.config_file.read_text()
    changed = re.sub(r"sharding: \w+", f"sharding: {sharding[second]}", text)
    assert changed != text
    run.config_file.chmod(0o644)
    run.config_file.write_text(changed)
    finish(run, 2)
    assert close(weights(run.path), weights(whole(folder).path))


@pytest.mark.slow
def test_gone_on_with_at_another_size(folder: Path, tmp_path: Path) -> None:
    more = ("model=stack", "cluster.device=cpu", "cluster.nproc_per_node=2")
    more = (*more, "model.dropout=0", "model.by_batch=false")  # or the cut would matter
    train(*quick(tmp_path / "twin", *more))
    slow = ("+data.train.delay=0.05", "trainer.save_interval=3")
    process = start(*quick(tmp_path / "cut", *more, *slow, "cluster.sharding=fsdp2"))
    run = wait_for_step(tmp_path / "cut", 3)
    said = kill(process, signal.SIGTERM)
    assert process.returncode == 75 and 3 <= status(run)["step"] < 24, said
    train(f"--config-dir={OWN}", f"outputs={tmp_path / 'cut'}", f"resume={run.name}",
          "cluster.device=cpu", "cluster.nproc_per_node=4", "cluster.sharding=fsdp2")  # fmt: skip
    assert close(weights(run), weights(only_run(tmp_path / "twin")))


@pytest.mark.parametrize(
    "ranks, samples, scenes", [(2, 20, 3), pytest.param(4, 8, 1, marks=pytest.mark.slow)]
)
def test_a_validation_of_which_ranks_have_more_or_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, samples: int, scenes: int
) -> None:
    gathered_alone(monkeypatch)
    val = (
        "data.val._target_=own_parts.Played",
        f"data.val.samples={samples}",
        f"+data.val.scenes={scenes}",
    )
    found = {}
    for way in ("fsdp2", "null"):
        file = tmp_path / f"{way}.jsonl"
        with monkeypatch.context() as patch:
            patch.setattr(Validation, "run", writes(file, Validation.run))
            finish(create(tmp_path / way, ranks, *val, f"cluster.sharding={way}"), ranks)
        found[way] = lines(file)
    assert len(found["null"]) == 2 * ranks and set(found["null"][0]) == {"val/loss", "val/total"}
    for mine, other in zip(found["fsdp2"], found["null"], strict=True):
        assert mine == pytest.approx(other, rel=1e-4)


def writes(file: Path, run: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
    """`Validation.run` that appends what it has measured, less its time, to `file`."""

    def wrapped(*arguments: Any) -> dict[str, float]:
        metrics = run(*arguments)
        with file.open("a") as out:
            out.write(json.dumps({k: v for k, v in metrics.items() if k != "val/time_s"}) + "\n")
        return metrics

    return wrapped


@pytest.mark.slow
def test_the_time_is_over_while_one_rank_waits_for_its_validation(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    stuck = ("data.val._target_=own_parts.Stuck", f"+data.val.flag={flag}")  # rank 1's sample
    more = ("model=stack", "cluster.device=cpu", "cluster.nproc_per_node=2")
    arguments = quick(tmp_path / "o", *more, *stuck, "cluster.sharding=fsdp2")
    done = train(*arguments, "trainer.max_time=0.15", code=75)
    run = only_run(tmp_path / "o")
    assert flag.with_suffix(".reached").exists() and "max_time" in status(run)["reason"], done
    flag.unlink()
    train(*arguments)
    assert status(run)["state"] == "finished"


def gathered_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a validation too, a block finds those before it cut again; where they are cut at all."""
    monkeypatch.syspath_prepend(OWN)
    from own_parts import Layer, Stack

    act, forward = Stack.act, Layer.forward
    done: list[nn.Module] = []

    def noted(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if isinstance(block, FSDPModule) and not torch.is_grad_enabled():
            assert all(is_sharded(p) for other in done for p in other.parameters())
            assert not any(map(is_sharded, block.parameters()))
            done.append(block)
        return forward(block, x)

    monkeypatch.setattr(Stack, "act", lambda self, batch: (done.clear(), act(self, batch))[1])
    monkeypatch.setattr(Layer, "forward", noted)


class Own(nn.Module):
    """A model of the parts that are given."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def test_a_validation_may_come_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As after a stop in the last one; the ranks are forked, so they have it too.
    begin = Trainer._begin
    monkeypatch.setattr(
        Trainer, "_begin", lambda self, data: (self.validate(), begin(self, data))[1]
    )
    mine = weights(finish(create(tmp_path, 2, "cluster.sharding=fsdp2"), 2).path)
    others = weights(cut(folder).path)
    assert all(same(mine[part], others[part]) for part in ("model", "optimizer", "ema"))


@pytest.mark.skipif(
    not hasattr(FSDPModule, "set_reduce_scatter_unused_params"), reason="torch is too old"
)
def test_a_rank_may_leave_a_parameter_out(tmp_path: Path) -> None:
    uneven = "model._target_=own_parts.Uneven"
    runs = [
        finish(create(tmp_path / str(way), 2, uneven, f"cluster.sharding={way}"), 2)
        for way in ("fsdp2", "null")
    ]
    mine, others = (weights(run.path) for run in runs)
    assert close(mine, others) and mine["model"]["extra.weight"].any()


def test_a_job_is_not_queued_for_what_cannot_be_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(OWN))
    overrides = ("model._target_=own_parts.Uneven", "+model.scalar=true", "cluster.sharding=fsdp2")
    asked = config(tmp_path, *overrides)
    found = preflight.check(asked, 2).problems
    (problem,) = found
    assert unnamed(problem, "cluster.sharding=fsdp2", "scale") == []
    assert preflight.check(asked, 1).problems == []


def test_what_is_gathered_at_once() -> None:
    inner = nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])
    model = Own(
        deep=nn.ModuleList([nn.ModuleList([Own(inner=inner), nn.Linear(2, 2)])]),
        head=nn.Linear(2, 2),
    )
    # Inner ones first; what has no parameters or no forward is none.
    names = [name for name, _ in sharding.units(model)]
    assert names == ["deep.0.1", "deep.0.0.inner.0", "deep.0.0", ""]
    assert sharding.unit_of(model)["deep.0.0.inner.0.bias"] == "deep.0.0.inner.0"
    assert sharding.unit_of(model)["head.bias"] == ""


def shared() -> nn.Module:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    return Own(layers=nn.ModuleList([first, second]))


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda: Own(scale=nn.Parameter(torch.ones(()))), ["scale"]),
        (shared, ["layers.1.weight", "layers.0", "layers.1"]),
        (
            lambda: Own(a=nn.Linear(2, 2), b=nn.Linear(2, 2).bfloat16()),
            ["torch.float32", "torch.bfloat16"],
        ),
        (lambda: Own(w=nn.Parameter(torch.ones(2, 3).t())), ["w", ".contiguous()"]),
    ],
)
def test_what_cannot_be_cut(model: Any, named: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        sharding.check_shardable(model())
    (problem,) = error.value.problems
    assert unnamed(problem, "cluster.sharding=fsdp2", "cluster.sharding=null", *named) == []


def test_types_may_differ_where_weights_are_frozen() -> None:
    model = Own(a=nn.Linear(2, 2), b=nn.Linear(2, 2).bfloat16())
    freeze(group_parameters(model, {"b": 0}))
    sharding.check_shardable(model)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["cluster.sharding=fsdp"], ["cluster.sharding='fsdp'", "fsdp2"]),
        (["cluster.sharding=fsdp2", "trainer.compile=true"], []),
    ],
)
def test_what_is_refused(tmp_path: Path, overrides: list[str], named: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check_config(config(tmp_path, *overrides))
    (problem,) = error.value.problems
    assert unnamed(problem, *(named or overrides)) == []


def test_one_rank_holds_everything(tmp_path: Path) -> None:
    whole = weights(finish(create(tmp_path / "whole", 1), 1).path)
    cut = weights(finish(create(tmp_path / "cut", 1, "cluster.sharding=fsdp2"), 1).path)
    assert same(cut, whole)
