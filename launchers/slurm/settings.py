"""The keys of cluster=slurm besides those that every cluster has: one field a key."""

# Without `from __future__ import annotations`: the keys are made from the types of the fields.
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from atlas.config.keys import key, keys_of, read
from atlas.errors import nearest

# sbatch parameters that Atlas sets itself, and the key that sets them; None: no key does.
OWN_PARAMETERS = {
    "nodes": "nodes",
    "ntasks": "nproc_per_node",
    "ntasks-per-node": "nproc_per_node",
    "cpus-per-task": "cpus_per_task",
    "mem": "mem_gb",
    "time": "timeout_min",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "signal": "signal_delay_s",
    "array": None,
    "output": None,
    "error": None,
    "open-mode": None,
    "requeue": None,
    "no-requeue": None,
    "job-name": None,
}


@dataclass(frozen=True)
class SlurmSettings:
    """What a job asks Slurm for, and how its run is submitted."""

    cpus_per_task: int | None = key(minimum=1)  # CPU cores per rank; null: the cluster's default
    mem_gb: float | None = key(above=0)  # memory per node in GB; null: the cluster's default
    timeout_min: int = key(minimum=1)  # time limit of one attempt in minutes
    partition: str | None = key()
    account: str | None = key()
    qos: str | None = key()
    constraint: str | None = key()  # features that a node must have
    array_parallelism: int | None = key(minimum=1)  # runs of one sweep that may run at once
    signal_delay_s: int = key(minimum=1)  # seconds before the time limit at which a run saves
    max_requeues: int = key(minimum=0)  # requeues after a time limit
    setup: list[str] | None = key()  # lines of shell before the ranks start
    sbatch: Mapping[str, Any] | None = key()  # further sbatch parameters
    preflight: Literal["full", "light"] = key()  # full: build the model before queueing
    wait: bool = key()  # whether the command stays until the run has ended

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "SlurmSettings":
        """Return the settings of checked `values`."""
        return read(cls, values, "cluster.")

    def further_parameters(self) -> dict[str, Any]:
        """Return `sbatch` by sbatch's own names, without those that are null or false."""
        return {
            sbatch_name(name): value
            for name, value in (self.sbatch or {}).items()
            if value is not None and value is not False
        }


KEYS = keys_of(SlurmSettings)


def problems(values: Mapping[str, Any]) -> list[str]:
    """Return everything that is wrong with `values`, the keys of cluster=slurm."""
    unknown = [
        f"cluster.{name} is not a key of cluster=slurm{nearest(name, KEYS)}"
        for name in values
        if name not in KEYS
    ]
    invalid = [
        f"cluster.{name}={values.get(name)!r} {problem}"
        for name, known in KEYS.items()
        if (problem := known.problem(values.get(name)))
    ]
    return unknown + invalid or list(_conflicts(SlurmSettings.of(values)))


def sbatch_name(name: object) -> str:
    """Return `name` as sbatch spells it: mail_type as mail-type."""
    return str(name).replace("_", "-")


def _conflicts(settings: SlurmSettings) -> Iterator[str]:
    limit_s = 60 * settings.timeout_min
    if settings.signal_delay_s >= limit_s:
        yield (
            f"cluster.signal_delay_s={settings.signal_delay_s} must be below the time limit, "
            f"cluster.timeout_min={settings.timeout_min} ({limit_s} s)"
        )
    for line in settings.setup or ():
        if not isinstance(line, str):
            yield f"cluster.setup holds {line!r}; every entry must be a line of shell"
    for name in map(sbatch_name, settings.sbatch or ()):
        if name in OWN_PARAMETERS:
            own = OWN_PARAMETERS[name]
            yield f"cluster.sbatch.{name}: {f'use cluster.{own}' if own else 'Atlas sets it itself'}"
