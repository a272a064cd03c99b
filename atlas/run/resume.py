"""Going on with a run that is there: by `resume=`, or by the same command again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from atlas.config.dotted import flatten
from atlas.config.schema import BATCH_SPLIT, KEYS
from atlas.errors import AtlasError, ConfigError
from atlas.run import trust
from atlas.run.directory import Command, Run
from atlas.run.identity import effective_batch, identity, is_excluded
from atlas.run.status import State

# Typed beside `resume=` these say where the run is and how to go on, not what it is.
LOCATORS = ("resume", "outputs", "name")


def adopt(config: Mapping[str, Any], command: Command) -> dict[str, Any]:
    """The configuration of the run that `resume` names, with what was typed beside it.

    Only what does not change the result can be typed: anything else is an error that names it.
    The run's own overrides and modules become those of `command`.
    """
    run = Run.find(str(config["resume"]), config["outputs"])
    head = run.read_config()["run"]
    trust.use_modules(run.config_file, head["sys_path"])
    adopted = copy.deepcopy(trust.config_of(run))
    del adopted["run"]
    adopted["fresh"] = False  # how the run was begun, not how it goes on
    add_new_keys(adopted)
    typed = [text.lstrip("+~").partition("=")[0].partition("@")[0] for text in command.overrides]
    foreign = [k for k in typed if not is_excluded(k) and k not in BATCH_SPLIT]
    if foreign:
        raise ConfigError(
            [
                f"{key} cannot be changed together with resume={config['resume']}: the run goes on "
                "with its own configuration; without resume= it is another run"
                for key in foreign
            ]
        )
    for key in typed:
        if key not in LOCATORS:
            _copy(config, adopted, key.replace("/", "."))
    command.overrides = head["overrides"]
    if trust.is_own(run.config_file) or trust.trusted():
        command.sys_path = list(dict.fromkeys([*command.sys_path, *head["sys_path"]]))
    adopted["resume"] = config["resume"]
    adopted["outputs"] = str(run.path.parent.parent)
    return adopted


def keep_effective_batch(config: dict[str, Any], run: Run, world_size: int) -> None:
    """Derive `trainer.accumulate` so that a resumed run keeps its effective batch; in place."""
    frozen = run.read_config()
    wanted = effective_batch(frozen, frozen["run"]["world_size"])
    size = int(config["data"]["batch_size"])
    if effective_batch(config, world_size) == wanted:
        return
    accumulate, rest = divmod(wanted, size * world_size)
    if rest or accumulate == 0:
        fitting = [n for n in range(1, wanted // size + 1) if wanted % (size * n) == 0]
        raise ConfigError(
            f"resume={config['resume']}: its effective batch of {wanted} samples cannot be cut over "
            f"{world_size} ranks of data.batch_size={size}; world sizes that would do: "
            f"{', '.join(map(str, fitting)) or 'none with this data.batch_size'}"
        )
    config["trainer"]["accumulate"] = accumulate


def check_source(config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where `init_from` names no run with a checkpoint."""
    if not config["init_from"]:
        return
    try:
        source = Run.find(config["init_from"], config["outputs"])
    except AtlasError as error:
        raise ConfigError(f"init_from={config['init_from']}: {error}") from error
    if not any(source.checkpoints.glob("[0-9]*")):
        raise ConfigError(
            f"init_from={config['init_from']}: {source.path} holds no checkpoint to start from"
        )


def announce(run: Run, config: Mapping[str, Any], world_size: int, command: Command) -> None:
    """Say what of this run is there already, and whether it was made by other code."""
    if not run.exists():
        for other in cut_otherwise(run, config, world_size):
            print(
                f"note: run {other.id} ({other.judge_state()}, step {other.read_status().step}) differs "
                f"only in its effective batch; to go on with it here: "
                f"python train.py resume={other.id}"
            )
        return
    if config["fresh"]:
        return
    status = run.read_status()
    if status.step:
        print(
            f"run {run.id} is there ({run.judge_state()} at step {status.step}); going on with it"
        )
    made_by = (status.git or {}).get("digest")
    if made_by and made_by != command.code["digest"]:
        print(
            "note: the code is not the code that made this run "
            f"({describe_code(status.git or {})} then, {describe_code(command.code)} now); "
            "to start over with the code as it is now, add fresh=true"
        )


def cut_otherwise(run: Run, config: Mapping[str, Any], world_size: int) -> list[Run]:
    """Unfinished runs of the same name that differ from `config` in the effective batch alone."""
    mine = flatten(identity(config, world_size))
    mine.pop("effective_batch")
    found = []
    for path in sorted(run.path.parent.glob("*/config.yaml")):
        other = Run(path.parent)
        if ".old-" in other.id or other.judge_state() in (State.FINISHED, None):
            continue
        try:
            theirs = flatten(other.read_identity())
        except AtlasError:  # damaged, and no matter of this run
            continue
        theirs.pop("effective_batch", None)
        if theirs == mine:
            found.append(other)
    return found


def describe_code(state: Mapping[str, Any]) -> str:
    """A commit, and whether there was more than it."""
    if not state.get("commit"):
        return f"no git, {state.get('digest')}"
    return f"commit {state['commit'][:10]}" + ("" if state["clean"] else " and uncommitted changes")


def add_new_keys(config: dict[str, Any]) -> None:
    """Give a configuration of an older Atlas the keys that have come since, as null; in place."""
    for key, spec in KEYS.items():
        *parents, last = key.split(".")
        node: Any = config
        for part in parents:
            node = node.get(part) if isinstance(node, dict) else None
        if spec.null and isinstance(node, dict):
            node.setdefault(last, None)


def _copy(source: Mapping[str, Any], target: dict[str, Any], key: str) -> None:
    *parents, last = key.split(".")
    for part in parents:
        source, target = source[part], target.setdefault(part, {})
    if last in source:
        target[last] = source[last]
    else:
        target.pop(last, None)
