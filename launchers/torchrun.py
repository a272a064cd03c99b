"""Under torchrun: rank 0 composes and creates the run, the others are told its directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from atlas import worker
from atlas.errors import EXIT_DONE, EXIT_FAILED, ConfigError
from atlas.run.directory import Run
from launchers.base import Handle, Launcher
from launchers.local.launcher import Ended

_KEY = "atlas/run"
_PATIENCE = timedelta(minutes=30)  # composing and checking take seconds; a node can start late


def is_torchrun() -> bool:
    """Whether torchrun (or torch.distributed.launch) started this process as one of its ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


class TorchrunLauncher(Launcher):
    """The ranks are here already; `submit` tells them the run and joins them as rank 0."""

    name = "torchrun"

    def __init__(self, device: str, sharding: str | None = None) -> None:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        super().__init__(int(os.environ["WORLD_SIZE"]) // local, local, device, sharding)

    def check(self) -> None:
        """torchrun has started what it has started."""

    def submit(self, runs: Sequence[Run]) -> list[Handle]:
        if len(runs) != 1:
            raise ConfigError(
                "-m starts many runs and torchrun holds the ranks of one; use "
                "python train.py -m … with cluster.nproc_per_node, which starts the ranks itself"
            )
        os.environ["ATLAS_LAUNCHER"] = self.name
        publish(str(runs[0].path))
        return [Ended(runs[0], worker.main(runs[0].path))]

    def _ranks_per_node(self, wanted: int | str) -> int:
        return int(wanted)


def main(compose: Callable[[], Any]) -> None:
    """Rank 0 runs `compose`; the others wait for the run that comes of it and join."""
    if os.environ["RANK"] != "0":
        worker.exit_process(_follow())
    try:
        compose()
        publish("0")  # nothing was started: a plan was printed, or the run is finished
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else EXIT_FAILED
        publish(str(code))
        worker.exit_process(code)
    except BaseException:
        publish(str(EXIT_FAILED))
        raise
    worker.exit_process(EXIT_DONE)


def publish(outcome: str) -> None:
    """Tell the other ranks the run's directory, or the code to exit with; the first word stands."""
    store = _store()
    if store.add(f"{_key()}/told", 1) == 1:
        store.set(_key(), outcome)


def _follow() -> int:
    told = _store().get(_key()).decode()
    if told.lstrip("-").isdigit():
        return int(told)
    os.environ["ATLAS_LAUNCHER"] = "torchrun"
    return worker.main(told)


def _key() -> str:
    # torchrun starts the ranks again after a failure, and its store remembers the last time.
    return f"{_KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


_STORES: list[Any] = []


def _store() -> Any:
    """The key-value store that all ranks share; kept open until the process ends."""
    if not _STORES:
        from atlas.training.ranks.world import shared_store

        _STORES.append(shared_store(_PATIENCE))
    return _STORES[0]


def refuse(cluster: str, multirun: bool) -> None:
    """Raise `ConfigError` for what makes no sense among ranks that torchrun has started."""
    if multirun:
        raise ConfigError(
            "-m under torchrun: torchrun holds the ranks of one run; use python train.py -m …, "
            "which starts the ranks of every run itself"
        )
    if not cluster.startswith("launchers.local."):
        raise ConfigError(
            f"cluster={cluster} under torchrun: the ranks are running already; either "
            "python train.py cluster=slurm …, or torchrun … with cluster=local"
        )
