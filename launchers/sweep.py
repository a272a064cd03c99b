"""Many runs from one command line: started together, told of in one table."""

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


@dataclass
class Job:
    """One run of a sweep: its resolved configuration, what was typed, and what of that is swept."""

    config: dict[str, Any]
    overrides: list[str]
    swept: list[str]
    keys: list[str]


@dataclass
class Started:
    """A job with its run; `handle` is None if the run was not started again."""

    job: Job
    run: Run
    launcher: Launcher
    handle: Handle | None = None


def sweep_and_tell(jobs: Sequence[Job], modules: Sequence[str]) -> None:
    """Run what is missing of `jobs` and print the table; exits as the worst of them did."""
    from launchers.hydra_errors import report_errors

    with report_errors():
        started = start(jobs, modules)
        code = EXIT_DONE
        for each in started:
            if each.handle is not None and not each.launcher.is_detached:
                code = max(code, each.handle.wait() or EXIT_DONE)
        sweep = sweep_of(started)
        sweep.write()
        print(sweep.table(), flush=True)
        if code:
            raise SystemExit(EXIT_STOPPED if code == EXIT_STOPPED else EXIT_FAILED)


def outcomes(jobs: Sequence[Job], modules: Sequence[str]) -> list[float | Exception]:
    """The objective of every job, once it has ended; the exception of one that failed."""
    from launchers.hydra_errors import report_errors

    with report_errors():
        started = start(jobs, modules)
        if any(each.handle and each.launcher.is_detached for each in started):
            raise ConfigError(
                "cluster.wait=false: a sweeper that chooses by the results of earlier runs has to "
                "wait for them; add cluster.wait=true"
            )
        for each in started:
            if each.handle is not None:
                each.handle.wait()
        sweep = sweep_of(started)
        sweep.write()
        print(sweep.table(), flush=True)
    return [_outcome(each) for each in started]


def start(jobs: Sequence[Job], modules: Sequence[str]) -> list[Started]:
    """Create and submit the runs of `jobs` that are neither finished nor at work.

    `modules` are the folders of the person's own code, which the runs' workers need too.
    """
    _check_all(jobs)
    origin = Provenance.collect([], modules)
    started: dict[Path, Started] = {}
    for launcher, members in _by_launcher(jobs):
        todo: list[Started] = []
        twice = 0
        for job in members:
            run = Run.locate(job.config, launcher.world_size)
            if run.path in started:
                twice += 1  # the same values, or the same written in another way
                continue
            started[run.path] = Started(job, run, launcher)
            if run.judge_state() is not State.FINISHED and not launcher.is_active(run):
                todo.append(started[run.path])
        launcher.preflight([each.job.config for each in todo])
        sweep = sweep_of(list(started.values()))
        sweep.write()
        for each in todo:
            typed = replace(origin, overrides=each.job.overrides, sweep=sweep.id)
            each.run.create(each.job.config, launcher.world_size, typed)
        runs = len(members) - twice
        print(
            f"{len(todo)} of {runs} runs to start, {runs - len(todo)} finished or at work already"
            + (f", {twice} given twice" if twice else ""),
            flush=True,
        )
        handles = launcher.submit([each.run for each in todo]) if todo else []
        for each, handle in zip(todo, handles, strict=True):
            each.handle = handle
        for text in dict.fromkeys(handle.describe() for handle in handles):
            if text:
                print(text, flush=True)
    return list(started.values())


def sweep_of(started: Sequence[Started]) -> Sweep:
    """Return the sweep that the runs belong to: the same for a wider grid over the same keys."""
    first = started[0]
    return Sweep.of(
        first.job.config,
        first.job.keys,
        [(each.run, each.job.swept) for each in started],
    )


def _check_all(jobs: Sequence[Job]) -> None:
    """Every problem of every configuration, once."""
    problems: list[str] = []
    for job in jobs:
        try:
            check(job.config)
            for key in ("resume", "fresh", "dry_run"):
                if job.config[key]:
                    problems.append(f"{key}={job.config[key]} is for one run; leave it out with -m")
        except ConfigError as error:
            problems += error.problems
        job.config["outputs"] = str(Path(job.config["outputs"]).absolute())
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def _by_launcher(jobs: Sequence[Job]) -> list[tuple[Launcher, list[Job]]]:
    """Jobs that run in the same place, handed to one launcher."""
    from launchers.launch import launcher_of

    places: dict[str, list[Job]] = {}
    for job in jobs:
        places.setdefault(json.dumps(job.config["cluster"], sort_keys=True), []).append(job)
    pairs = []
    for members in places.values():
        launcher = launcher_of(members[0].config)
        launcher.check()
        pairs.append((launcher, members))
    return pairs


def _outcome(started: Started) -> float | Exception:
    value = score(started.run, started.job.config["objective"])
    if started.run.judge_state() is State.FINISHED and value is not None:
        return value
    return AtlasError(
        f"run {started.run.id}: {started.run.judge_state()}: {started.run.read_status().reason}"
    )
