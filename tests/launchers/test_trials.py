"""Which runs of a sweep are started, and how it ends, with a launcher that only records."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from atlas.errors import ConfigError
from atlas.run.directory import Run
from atlas.run.provenance import Provenance
from atlas.run.status import State, end
from launchers import sweep
from launchers.base import EndedHandle, Handle, Launcher
from launchers.launch import resolve
from launchers.sweep import Trial, objectives, run_sweep, start

CONF = Path(__file__).resolve().parents[2] / "conf"


class Recorder(Launcher):
    """Ends every run at once, in the states and with the codes that it was given by seed."""

    name = "recorder"

    def __init__(self, ends: Mapping[int, tuple[State, int]], active: Sequence[int] = ()) -> None:
        super().__init__(1, 1, "cpu")
        self.ends, self.active = ends, active
        self.preflighted: list[int] = []
        self.submitted: list[int] = []

    def check(self) -> None:
        pass

    def preflight(self, configs: Sequence[Mapping[str, Any]]) -> None:
        self.preflighted += [config["seed"] for config in configs]

    def is_active(self, run: Run) -> bool:
        return run.exists() and seed_of(run) in self.active

    def submit(self, runs: Sequence[Run]) -> list[Handle]:
        handles: list[Handle] = []
        for run in runs:
            state, code = self.ends.get(seed_of(run), (State.FINISHED, 0))
            best = {"metric": "val/loss", "value": float(seed_of(run)), "step": 1}
            end(run, state, None if code == 0 else "broken", best=best)
            self.submitted.append(seed_of(run))
            handles.append(EndedHandle(run, code))
        return handles

    def _ranks_per_node(self, wanted: int | str) -> int:
        return int(wanted)


def seed_of(run: Run) -> int:
    return int(run.read_config()["seed"])


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return resolve(compose("config", ["data.val=null", "tracking=none"]))


@pytest.fixture(autouse=True)
def no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atlas.run.provenance.code_version", lambda _: {"digest": "0"})


@pytest.fixture
def trials(composed, tmp_path):
    """Makes trials of the given seeds."""

    def make(*seeds: int, **changes: Any) -> list[Trial]:
        made = []
        for seed in seeds:
            config = {**copy.deepcopy(composed), "seed": seed, "outputs": str(tmp_path), **changes}
            made.append(Trial(config, [f"seed={seed}"], [f"seed={seed}"], ["seed"]))
        return made

    return make


def use(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "launcher_of", lambda config: launcher)


def test_missing_runs_are_started_once(trials, monkeypatch, capsys):
    launcher = Recorder({})
    use(launcher, monkeypatch)
    started = start(trials(1, 2, 1), [])
    assert launcher.submitted == launcher.preflighted == [1, 2]
    assert [bool(each.handle) for each in started] == [True, True]
    assert capsys.readouterr().out.split()[:3] == ["2", "of", "2"]
    again = start(trials(1, 2, 3), [])
    assert launcher.submitted == [1, 2, 3]
    assert [bool(each.handle) for each in again] == [False, False, True]
    assert len({each.run.read_config()["run"]["sweep"] for each in again}) == 1


@pytest.mark.parametrize(
    ("state", "is_started"),
    [
        (State.FINISHED, False),
        (State.FAILED, True),
        (State.KILLED, True),
        (State.PREEMPTED, True),
        (State.QUEUED, True),
    ],
)
def test_which_runs_are_missing(trials, monkeypatch, state, is_started):
    launcher = Recorder({})
    use(launcher, monkeypatch)
    (trial,) = trials(1)
    run = Run.locate(trial.config, 1)
    run.create(trial.config, 1, Provenance.collect([]))
    run.update_status(state=state)
    start(trials(1), [])
    assert launcher.submitted == ([1] if is_started else [])


def test_runs_in_the_queue_are_left_there(trials, monkeypatch):
    use(Recorder({}), monkeypatch)
    start(trials(1, 2), [])
    for run in [Run.locate(trial.config, 1) for trial in trials(1, 2)]:
        run.update_status(state=State.QUEUED)
    launcher = Recorder({}, active=[2])
    use(launcher, monkeypatch)
    start(trials(1, 2), [])
    assert launcher.submitted == [1]


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ({}, None),
        ({2: (State.FAILED, 1)}, 1),
        ({2: (State.KILLED, 75)}, 75),
        ({1: (State.FAILED, 1), 2: (State.KILLED, 75)}, 75),
        ({1: (State.KILLED, 130)}, 1),
    ],
)
def test_exit_code_of_a_sweep(trials, monkeypatch, capsys, ends, code):
    use(Recorder(ends), monkeypatch)
    if code is None:
        run_sweep(trials(1, 2), [])
    else:
        with pytest.raises(SystemExit) as exit_:
            run_sweep(trials(1, 2), [])
        assert exit_.value.code == code
    table = capsys.readouterr().out
    assert "seed=1" in table and "seed=2" in table


def test_objectives(trials, monkeypatch):
    use(Recorder({2: (State.FAILED, 1)}), monkeypatch)
    good, bad = objectives(trials(1, 2), [])
    assert good == 1.0
    assert "failed: broken" in str(bad)


def test_a_sweeper_has_to_wait(trials, monkeypatch, capsys):
    launcher = Recorder({})
    launcher.is_detached = True
    use(launcher, monkeypatch)
    with pytest.raises(SystemExit) as exit_:
        objectives(trials(1), [])
    assert exit_.value.code == 1 and "cluster.wait" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["resume", "fresh", "dry_run"])
def test_keys_of_one_run_are_refused(trials, monkeypatch, key):
    launcher = Recorder({})
    use(launcher, monkeypatch)
    value = "0123456789" if key == "resume" else True
    with pytest.raises(ConfigError) as error:
        start(trials(1, 2, **{key: value}), [])
    assert error.value.problems == [f"{key}={value} is for one run; leave it out with -m"]
    assert launcher.submitted == []


def test_equal_clusters_share_a_launcher(trials, monkeypatch, composed):
    launchers: list[Recorder] = []

    def launcher_of(config: Mapping[str, Any]) -> Launcher:
        launchers.append(Recorder({}))
        return launchers[-1]

    monkeypatch.setattr(sweep, "launcher_of", launcher_of)
    other = {**composed["cluster"], "device": "cpu"}
    start([*trials(1, 2), *trials(3, cluster=other)], [])
    assert [launcher.submitted for launcher in launchers] == [[1, 2], [3]]
