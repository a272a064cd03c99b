"""Many runs from one command line: started together, and summarized in one table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atlas.config.checks import check
from atlas.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, AtlasError, ConfigError
from atlas.record.sweep import Sweep, score
from atlas.run.directory import Run
from atlas.run.provenance import Provenance
from atlas.run.status import State
from launchers.base import Handle, Launcher
from launchers.hydra_errors import report_errors
from launchers.launch import launcher_of


@dataclass
class Trial:
    """One combination of the swept values, as Hydra composed it."""

    config: dict[str, Any]
    overrides: list[str]  # all that were typed, with this combination's values
    swept: list[str]  # those among them that differ between trials
    keys: list[str]  # the keys that are swept


@dataclass
class StartedTrial:
    """A trial with its run; `handle` is None if the run was finished or running already."""

    trial: Trial
    run: Run
    launcher: Launcher
    handle: Handle | None = None


def run_sweep(trials: Sequence[Trial], modules: Sequence[str]) -> None:
    """Run what is missing of `trials`, print the table, and exit with the worst of their codes."""
    with report_errors():
        started = start(trials, modules)
        code = EXIT_DONE
        for each in started:
            if each.handle is not None and not each.launcher.is_detached:
                code = max(code, each.handle.wait() or EXIT_DONE)
        _summarize(started)
        if code:
            raise SystemExit(EXIT_STOPPED if code == EXIT_STOPPED else EXIT_FAILED)


def objectives(trials: Sequence[Trial], modules: Sequence[str]) -> list[float | Exception]:
    """Run `trials` to their end and return the objective of each, or the exception if it failed."""
    with report_errors():
        started = start(trials, modules)
        if any(each.handle and each.launcher.is_detached for each in started):
            raise ConfigError(
                "cluster.wait=false: a sweeper that chooses by the results of earlier runs has to "
                "wait for them; add cluster.wait=true"
            )
        for each in started:
            if each.handle is not None:
                each.handle.wait()
        _summarize(started)
    return [_objective(each) for each in started]


def start(trials: Sequence[Trial], modules: Sequence[str]) -> list[StartedTrial]:
    """Create and submit the runs of `trials` that are neither finished nor running or queued.

    `modules` are the folders with the user's own modules, which the workers import too.
    """
    _check_all(trials)
    provenance = Provenance.collect([], modules)
    started: dict[Path, StartedTrial] = {}
    for launcher, members in _by_launcher(trials):
        missing: list[StartedTrial] = []
        duplicates = 0
        for trial in members:
            run = Run.locate(trial.config, launcher.world_size)
            if run.path in started:
                duplicates += 1  # equal values, perhaps written in another way
                continue
            started[run.path] = StartedTrial(trial, run, launcher)
            if run.judge_state() is not State.FINISHED and not launcher.is_active(run):
                missing.append(started[run.path])
        launcher.preflight([each.trial.config for each in missing])
        sweep = sweep_of(list(started.values()))
        sweep.write()
        for each in missing:
            own = replace(provenance, overrides=each.trial.overrides, sweep=sweep.id)
            each.run.create(each.trial.config, launcher.world_size, own)
        _announce(len(missing), len(members), duplicates)
        _submit(launcher, missing)
    return list(started.values())


def sweep_of(started: Sequence[StartedTrial]) -> Sweep:
    """Return the sweep that the runs belong to: the same for a wider grid over the same keys."""
    first = started[0].trial
    return Sweep.of(first.config, first.keys, [(each.run, each.trial.swept) for each in started])


def _check_all(trials: Sequence[Trial]) -> None:
    """Raise `ConfigError` with every problem of every configuration, each once."""
    problems: list[str] = []
    for trial in trials:
        try:
            check(trial.config)
            for key in ("resume", "fresh", "dry_run"):
                if trial.config[key]:
                    value = trial.config[key]
                    problems.append(f"{key}={value} is for one run; leave it out with -m")
        except ConfigError as error:
            problems += error.problems
        trial.config["outputs"] = str(Path(trial.config["outputs"]).absolute())
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def _by_launcher(trials: Sequence[Trial]) -> list[tuple[Launcher, list[Trial]]]:
    """Group trials with an equal `cluster` section under one launcher."""
    clusters: dict[str, list[Trial]] = {}
    for trial in trials:
        clusters.setdefault(json.dumps(trial.config["cluster"], sort_keys=True), []).append(trial)
    pairs = []
    for members in clusters.values():
        launcher = launcher_of(members[0].config)
        launcher.check()
        pairs.append((launcher, members))
    return pairs


def _announce(missing: int, trials: int, duplicates: int) -> None:
    runs = trials - duplicates
    text = f"{missing} of {runs} runs to start, {runs - missing} already finished or running"
    print(text + (f", {duplicates} duplicate(s)" if duplicates else ""), flush=True)


def _submit(launcher: Launcher, missing: Sequence[StartedTrial]) -> None:
    handles = launcher.submit([each.run for each in missing]) if missing else []
    for each, handle in zip(missing, handles, strict=True):
        each.handle = handle
    for text in dict.fromkeys(handle.describe() for handle in handles):
        if text:
            print(text, flush=True)


def _summarize(started: Sequence[StartedTrial]) -> None:
    """Write the sweep with what its runs have reached, and print its table."""
    sweep = sweep_of(started)
    sweep.write()
    print(sweep.table(), flush=True)


def _objective(started: StartedTrial) -> float | Exception:
    run = started.run
    value = score(run, started.trial.config["objective"])
    state = run.judge_state()
    if state is State.FINISHED and value is not None:
        return value
    return AtlasError(f"run {run.id}: {state}: {run.read_status().reason}")
