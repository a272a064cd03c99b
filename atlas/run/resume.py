"""Resuming a run that exists: by `resume=`, or by the same command again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from atlas.config.dotted import add_default, assign, flatten, lookup, remove
from atlas.config.schema import BATCH_SPLIT, KEYS
from atlas.errors import AtlasError, ConfigError
from atlas.run import trust
from atlas.run.directory import Run
from atlas.run.identity import effective_batch, frozen_identity, identity, is_excluded
from atlas.run.provenance import Provenance, describe_code
from atlas.run.status import State

# Next to `resume=` these say where the run is, not what it is.
LOCATORS = ("resume", "outputs", "name")


def adopt(config: Mapping[str, Any], typed: Provenance) -> tuple[dict[str, Any], Provenance]:
    """Return the configuration of the run that `resume` names, and its provenance.

    What was `typed` next to `resume=` is taken over unless it would change the result, which raises
    `ConfigError` naming each such key. The run's overrides stay its own; its folders of modules
    follow those that were typed.
    """
    run = Run.find(str(config["resume"]), config["outputs"])
    adopted = run.read_config()
    head = adopted.pop("run")
    trust.extend_sys_path(run.config_file, head["sys_path"])
    trust.require_trust(run.config_file, adopted)
    adopted["fresh"] = False  # it says how the run began, not how it is resumed
    add_new_keys(adopted)
    keys = [text.lstrip("+~").partition("=")[0].partition("@")[0] for text in typed.overrides]
    foreign = [k for k in keys if not is_excluded(k) and k not in BATCH_SPLIT]
    if foreign:
        raise ConfigError(
            [
                f"{key} cannot be changed together with resume={config['resume']}: a run is resumed "
                "with its own configuration; without resume= this is another run"
                for key in foreign
            ]
        )
    for key in keys:
        if key not in LOCATORS:
            _copy(config, adopted, key.replace("/", "."))
    folders = list(typed.sys_path)
    if trust.is_own(run.config_file) or trust.trusted_prefixes():
        folders = list(dict.fromkeys([*folders, *head["sys_path"]]))
    adopted["resume"] = config["resume"]
    adopted["outputs"] = str(run.path.parent.parent)
    return adopted, replace(typed, overrides=head["overrides"], sys_path=folders)


def keep_effective_batch(config: dict[str, Any], run: Run, world_size: int) -> None:
    """Derive `trainer.accumulate` in `config` so that a resumed run keeps its effective batch.

    Raise `ConfigError` with the world sizes that would do if this one cannot.
    """
    frozen = run.read_config()
    wanted = effective_batch(frozen, frozen["run"]["world_size"])
    size = config["data"]["batch_size"]
    if effective_batch(config, world_size) == wanted:
        return
    accumulate, rest = divmod(wanted, size * world_size)
    if rest or accumulate == 0:
        fitting = [n for n in range(1, wanted // size + 1) if wanted % (size * n) == 0]
        raise ConfigError(
            f"resume={config['resume']}: its effective batch of {wanted} samples cannot be split over "
            f"{world_size} ranks of data.batch_size={size}; world sizes that would do: "
            f"{', '.join(map(str, fitting)) or 'none with this data.batch_size'}"
        )
    config["trainer"]["accumulate"] = accumulate


def require_source(config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if `init_from` names no run with a checkpoint."""
    if not config["init_from"]:
        return
    try:
        source = Run.find(config["init_from"], config["outputs"])
    except AtlasError as error:
        raise ConfigError(f"init_from={config['init_from']}: {error}") from error
    if not any(source.checkpoints.glob("[0-9]*")):
        raise ConfigError(
            f"init_from={config['init_from']}: {source.path} has no checkpoint to start from"
        )


def announce(run: Run, config: Mapping[str, Any], world_size: int, provenance: Provenance) -> None:
    """Print what of this run exists already, and whether other code made it."""
    if not run.exists():
        for other in with_another_batch(run, config, world_size):
            print(
                f"note: run {other.id} ({other.judge_state()}, step {other.read_status().step}) differs "
                f"only in its effective batch; to resume it here: "
                f"python train.py resume={other.id}"
            )
        return
    if config["fresh"]:
        return
    status = run.read_status()
    if status.step:
        print(f"resuming run {run.id} ({run.judge_state()} at step {status.step})")
    made_by = (status.git or {}).get("digest")
    if made_by and made_by != provenance.code["digest"]:
        print(
            "note: the code has changed since this run began "
            f"({describe_code(status.git or {})} then, {describe_code(provenance.code)} now); "
            "to start over with the code of now, add fresh=true"
        )


def with_another_batch(run: Run, config: Mapping[str, Any], world_size: int) -> list[Run]:
    """Return the unfinished runs of the same name that differ in the effective batch alone."""
    mine = flatten(identity(config, world_size))
    mine.pop("effective_batch")
    found = []
    for path in sorted(run.path.parent.glob("*/config.yaml")):
        other = Run(path.parent)
        if ".old-" in other.id or other.judge_state() in (State.FINISHED, None):
            continue
        try:
            theirs = flatten(frozen_identity(other.read_config()))
        except AtlasError:  # damaged, which does not concern this run
            continue
        theirs.pop("effective_batch", None)
        if theirs == mine:
            found.append(other)
    return found


def add_new_keys(config: dict[str, Any]) -> None:
    """Add the keys that came after the version of Atlas that wrote `config`, as null."""
    for key, spec in KEYS.items():
        if spec.null:
            add_default(config, key, None)


def _copy(source: Mapping[str, Any], target: dict[str, Any], key: str) -> None:
    found, value = lookup(source, key)
    if found:
        assign(target, key, value)
    else:
        remove(target, key)
