"""What rank 0 publishes under torchrun, and what the other ranks make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest

from atlas import worker
from atlas.errors import AtlasError, ConfigError
from atlas.run.directory import Run
from launchers import torchrun
from launchers.torchrun import TorchrunLauncher, is_torchrun, publish, refuse


class Exited(BaseException):
    """The process would have ended with this code."""


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store as torchrun's, a worker that ends with 42, and exits that a test can see."""
    from torch.distributed import HashStore

    def exit_process(code: int) -> NoReturn:
        raise Exited(code)

    monkeypatch.setattr(torchrun, "_STORES", [HashStore()])
    monkeypatch.setattr(worker, "exit_process", exit_process)
    monkeypatch.setattr(worker, "main", lambda path: 42)
    for name in ("ATLAS_LAUNCHER", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")


def code_of(rank: int, monkeypatch: pytest.MonkeyPatch, compose: Any = None) -> int | str:
    """The code that a rank ends with, or the name of the exception that it raises."""
    monkeypatch.setenv("RANK", str(rank))
    try:
        torchrun.main(compose)
    except Exited as exited:
        return int(exited.args[0])
    except BaseException as error:
        return type(error).__name__
    raise AssertionError("main returned")


def submit() -> None:
    """What launch does in the end with a run."""
    launcher = TorchrunLauncher("cpu")
    (handle,) = launcher.submit([Run("/nowhere/run")])
    if code := handle.wait():
        raise SystemExit(code)


def fail(error: BaseException) -> Any:
    def compose() -> None:
        raise error

    return compose


@pytest.mark.parametrize(
    ("compose", "rank_0", "others"),
    [
        (lambda: None, 0, 0),  # only a plan, or a finished run
        (submit, 42, 42),
        (fail(SystemExit(1)), 1, 1),  # a wrong command line
        (fail(SystemExit(130)), 130, 130),
        (fail(SystemExit("text")), 1, 1),
        (fail(SystemExit(None)), 1, 1),
        (fail(RuntimeError("bug")), "RuntimeError", 1),
        (fail(KeyboardInterrupt()), "KeyboardInterrupt", 1),
    ],
)
def test_ranks_end_alike(ranks, monkeypatch, compose, rank_0, others):
    assert code_of(0, monkeypatch, compose) == rank_0
    assert [code_of(rank, monkeypatch) for rank in (1, 2, 3)] == [others] * 3


def test_the_others_train_the_run_that_is_published(ranks, monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr(worker, "main", lambda path: seen.append(str(path)) or 75)
    assert code_of(0, monkeypatch, submit) == 75
    assert code_of(1, monkeypatch) == 75
    assert seen == ["/nowhere/run"] * 2


def test_a_restart_has_an_outcome_of_its_own(ranks, monkeypatch):
    assert code_of(0, monkeypatch, fail(SystemExit(1))) == 1
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert code_of(0, monkeypatch, submit) == 42
    assert code_of(1, monkeypatch) == 42


def test_the_first_outcome_counts(ranks, monkeypatch):
    publish("3")
    publish("4")
    assert code_of(1, monkeypatch) == 3


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "0"}, True),
        ({"RANK": "0"}, False),
        ({"TORCHELASTIC_RUN_ID": "x"}, False),
        ({}, False),
    ],
)
def test_is_torchrun(monkeypatch, variables, expected):
    for name in ("TORCHELASTIC_RUN_ID", "RANK"):
        monkeypatch.setenv(name, variables.get(name, ""))
        if name not in variables:
            monkeypatch.delenv(name)
    assert is_torchrun() == expected


def test_sizes(ranks):
    launcher = TorchrunLauncher("cpu")
    assert (launcher.nodes, launcher.nproc_per_node, launcher.world_size) == (2, 2, 4)
    with pytest.raises(ConfigError, match="-m"):
        launcher.submit([Run(Path("a")), Run(Path("b"))])


@pytest.mark.parametrize(
    ("cluster", "is_sweep", "refused"),
    [
        ("launchers.local.LocalLauncher", False, False),
        ("launchers.local.LocalLauncher", True, True),
        ("launchers.slurm.SlurmLauncher", False, True),
    ],
)
def test_what_is_refused(cluster, is_sweep, refused):
    try:
        refuse(cluster, is_sweep)
    except AtlasError:
        assert refused
    else:
        assert not refused
