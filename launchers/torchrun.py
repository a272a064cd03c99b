"""Ranks that torchrun has started: rank 0 composes and creates the run, the others join it.

torchrun starts the same command on every rank. If each composed the configuration for itself, the
ranks could disagree: their files and environments can differ between nodes, and two of them would
create one directory. So only rank 0 composes, checks, creates the run and holds its lock. It
publishes the run's directory in the key-value store that torchrun sets up, and the others wait for
it. If rank 0 starts no run, because the command is wrong or the run is finished, it publishes an
exit code instead, and every rank ends with that: otherwise torchrun would see ranks that wait until
they time out, and report those as the failure.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from atlas import worker
from atlas.errors import EXIT_DONE, EXIT_FAILED, ConfigError
from atlas.run.directory import Run
from launchers.base import EndedHandle, Handle, Launcher

KEY = "atlas/run"
TIMEOUT = timedelta(minutes=30)  # composing and checking take seconds, but a node can start late


def is_torchrun() -> bool:
    """Return whether torchrun (or torch.distributed.launch) started this process as a rank."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


class TorchrunLauncher(Launcher):
    """The ranks run already: `submit` publishes the run to them and trains as rank 0."""

    name = "torchrun"

    def __init__(self, device: str, sharding: str | None = None) -> None:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        super().__init__(int(os.environ["WORLD_SIZE"]) // local, local, device, sharding)

    def check(self) -> None:
        """Accept what torchrun has started."""

    def submit(self, runs: Sequence[Run]) -> list[Handle]:
        """Train the only run, as rank 0, to its end."""
        if len(runs) != 1:
            raise ConfigError(
                "-m starts many runs and torchrun holds the ranks of one; use "
                "python train.py -m … with cluster.nproc_per_node, which starts the ranks itself"
            )
        os.environ["ATLAS_LAUNCHER"] = self.name
        publish(str(runs[0].path))
        return [EndedHandle(runs[0], worker.main(runs[0].path))]

    def _ranks_per_node(self, wanted: int | str) -> int:
        return int(wanted)


def main(compose: Callable[[], Any]) -> None:
    """Call `compose` on rank 0, join its run on the others, and exit."""
    if os.environ["RANK"] != "0":
        worker.exit_process(_join())
    try:
        compose()
        publish(str(EXIT_DONE))  # no run was started: it is finished, or only the plan was printed
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else EXIT_FAILED
        publish(str(code))
        worker.exit_process(code)
    except BaseException:
        publish(str(EXIT_FAILED))
        raise
    worker.exit_process(EXIT_DONE)


def publish(outcome: str) -> None:
    """Give the other ranks the run's directory, or an exit code; only the first call counts."""
    store = _store()
    # A run that was published can still fail here, and then rank 0 publishes its exit code too.
    if store.add(f"{_key()}/published", 1) == 1:
        store.set(_key(), outcome)


def refuse(cluster: str, is_sweep: bool) -> None:
    """Raise `ConfigError` for what cannot work with ranks that torchrun has started."""
    if is_sweep:
        raise ConfigError(
            "-m under torchrun: torchrun holds the ranks of one run; use python train.py -m …, "
            "which starts the ranks of every run itself"
        )
    if not cluster.startswith("launchers.local."):
        raise ConfigError(
            f"cluster={cluster} under torchrun: the ranks are running already; either "
            "python train.py cluster=slurm …, or torchrun … with cluster=local"
        )


def _join() -> int:
    """Wait for what rank 0 publishes, and return the exit code of this rank."""
    outcome = _store().get(_key()).decode()
    if outcome.lstrip("-").isdigit():
        return int(outcome)
    os.environ["ATLAS_LAUNCHER"] = TorchrunLauncher.name
    return worker.main(outcome)


def _key() -> str:
    # torchrun starts all ranks again after a failure, and its store still holds the last attempt.
    return f"{KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


_STORES: list[Any] = []


def _store() -> Any:
    """Return the key-value store that all ranks share; it stays open until the process ends."""
    if not _STORES:
        from atlas.training.ranks.world import shared_store

        _STORES.append(shared_store(TIMEOUT))
    return _STORES[0]
