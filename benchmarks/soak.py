"""Runs for a given time, with kills at random and a tracking server that comes and goes.

python benchmarks/soak.py --minutes 10

Two runs are at work at any time, and a third as a job where this machine has a Slurm (tests/launchers/slurm/up
starts one; `--slurm` insists on it). Each is struck up to four times at random moments: by SIGKILL,
SIGTERM and SIGUSR2; the job by Slurm's own means and by a crash. Each is started again where nothing
else does it, and at its end compared to the bit with a twin that nothing happened to; the server of
MLflow is killed and started again meanwhile. The count at the end says what was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from jobs import EVENTS, Job
from measure import ROOT, environment, heading
from victims import Victim, points

from atlas.errors import AtlasError
from launchers.slurm.queue import queue

KINDS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR2)
UPDATES = 120
RUN = (f"trainer.steps={UPDATES}", "trainer.save_interval=7", "trainer.val_interval=30")
SLOW = ("model.pause=0.01",)
AT_ONCE = 2
SERVER_S = (15.0, 40.0)  # between two deaths of the server


class Server:
    """A real `mlflow server` on loopback, killed and started again until it is stopped."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        from atlas.record.shipping.mlflow_store import create_sqlite

        self._folder, self._chance = folder, chance
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        self.uri = f"http://127.0.0.1:{self._port}"
        self.deaths = 0
        create_sqlite(folder / "mlflow.db")
        self._stop = threading.Event()
        self._start()
        self._thread = threading.Thread(target=self._come_and_go, daemon=True)
        self._thread.start()

    def stay(self) -> None:
        """From now on it is there."""
        self._stop.set()
        self._thread.join()
        while not self._answers():
            time.sleep(0.2)

    def end(self) -> None:
        """Take it away for good."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _come_and_go(self) -> None:
        while not self._stop.wait(self._chance.uniform(*SERVER_S)):
            self.end()
            self.deaths += 1
            self._stop.wait(self._chance.uniform(0, 5))
            self._start()

    def _start(self) -> None:
        options = f"--backend-store-uri sqlite:///{self._folder}/mlflow.db --workers 1"
        options += f" --artifacts-destination {self._folder}/artifacts --port {self._port}"
        with open(self._folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *options.split()],
                stdout=log,
                stderr=log,
                env=environment(),
                start_new_session=True,
            )

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        with contextlib.suppress(OSError):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False


class Pair:
    """A run, its twin without faults, and how often it is still to be struck."""

    kind: type[Victim] = Victim

    def __init__(self, folder: Path, seed: int, uri: str, chance: random.Random) -> None:
        self._chance = chance
        self.twin = Victim(folder / f"twin{seed}", *RUN, f"seed={seed}")
        self.victim = self.kind(
            folder / f"run{seed}",
            *(*RUN, *SLOW, f"seed={seed}"),
            *("tracking=mlflow", "tracking.wait_s=0", f"tracking.uri={uri}"),
        )
        self.strikes = chance.randint(1, 4)
        self.victim.start()
        self._aim()

    def look(self, faults: Counter[str]) -> bool:
        """Strike where it is time to; whether the run has finished."""
        assert self.victim.process
        code = self.victim.process.poll()
        if code is None and self.strikes and self._is_time():
            self.strikes -= 1
            self.strike(faults)
            code = self.victim.process.poll()
        if code is None or code == 0:
            return code == 0
        # A signal that comes before the worker has its handlers ends it, as it does any process.
        if code != 75 and -code not in KINDS:
            raise SystemExit(f"exit {code}\n{self.victim.said()[-3000:]}")
        self.victim.start()
        self._aim()
        return False

    def strike(self, faults: Counter[str]) -> None:
        """Strike once, and count it."""
        number = self._chance.choice(KINDS)
        faults[number.name] += self.victim.strike(number)

    def _aim(self) -> None:
        """Three times of four at an update, otherwise at a moment, which may be one of the start."""
        self._update = self.victim.taken + self._chance.randint(1, UPDATES // 3)
        if self._chance.random() < 0.75:
            self._at = float("inf")
        else:
            self._at = time.monotonic() + self._chance.uniform(0.05, 4.0)

    def _is_time(self) -> bool:
        return time.monotonic() > self._at or self.victim.taken >= self._update


class QueuedPair(Pair):
    """The same of a job in Slurm's queue."""

    kind = Job
    victim: Job

    def strike(self, faults: Counter[str]) -> None:
        """Let something happen to the job; it goes on by itself, or is sent again."""
        what = self._chance.choice(list(EVENTS))
        struck = self.victim.befall(what)
        faults[what] += struck
        self.strikes += not struck  # it waited in the queue
        self._aim()


def slurm_answers() -> bool:
    """Whether there is a queue to send jobs to."""
    with contextlib.suppress(AtlasError):
        queue([])
        return True
    return False


def tracked(victim: Victim, uri: str) -> Counter[str]:
    """How many points of the journal the store lacks, or has twice; sends what is left first."""
    from atlas.record.shipping.mlflow_store import MlflowClient

    sync = [sys.executable, "-m", "atlas.cli", "sync", str(victim.run)]
    done = subprocess.run(sync, cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode:
        print(f"atlas sync: {done.stdout}{done.stderr}")
    client = MlflowClient(tracking_uri=uri)
    record: Any = json.loads((victim.run / "mlflow.json").read_text())
    found: Counter[tuple[int, str]] = Counter()
    for key in client.get_run(record["run_id"]).data.metrics:
        for point in client.get_metric_history(record["run_id"], key):
            found[point.step, key] += 1
    wanted = {at for at in points(victim.run) if at[1] != "time"}
    return Counter(
        {
            "missing in MLflow": sum(at not in found for at in wanted),
            "doubled in MLflow": sum(count - 1 for count in found.values()),
        }
    )


def main() -> None:
    """Strike until the time is over, let all runs finish, and count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slurm", action="store_true", help="fail where there is no Slurm")
    args = parser.parse_args()
    kinds: list[type[Pair]] = [Pair] * AT_ONCE
    if slurm_answers():
        kinds.append(QueuedPair)
    elif args.slurm:
        raise SystemExit("no Slurm answers here; tests/launchers/slurm/up starts one")
    chance = random.Random(args.seed)
    print(heading(f"Soak of {args.minutes:g} min"), flush=True)
    folder = Path(tempfile.mkdtemp(prefix="atlas-soak-"))
    server = Server(folder, random.Random(args.seed + 1))
    faults: Counter[str] = Counter()
    try:
        ended = strike_until(
            time.monotonic() + 60 * args.minutes, folder, server.uri, chance, faults, kinds
        )
        server.stay()
        lost = count(ended, server.uri)
    finally:
        server.end()
    faults["mlflow server killed"] = server.deaths
    jobs = sum(isinstance(pair, QueuedPair) for pair in ended)
    print(f"runs finished: {len(ended)}, {jobs} of them on Slurm")
    print(f"faults: {sum(faults.values())} ({', '.join(f'{n} {k}' for k, n in faults.items())})")
    print(f"updates taken again: {sum(pair.victim.repeated for pair in ended)}")
    print("\n".join(f"{what}: {number}" for what, number in lost.items()))
    if sum(lost.values()):
        raise SystemExit(f"something was lost; the runs are in {folder}")
    shutil.rmtree(folder, ignore_errors=True)


def strike_until(
    end: float,
    folder: Path,
    uri: str,
    chance: random.Random,
    faults: Counter[str],
    kinds: list[type[Pair]],
) -> list[Pair]:
    """All runs that were started before `end`, finished; one of each of `kinds` at a time."""
    seed, active, ended = 0, list[Pair](), list[Pair]()
    while active or time.monotonic() < end:
        free = list(kinds)
        for pair in active:
            free.remove(type(pair))
        for kind in free if time.monotonic() < end else ():
            seed += 1
            active.append(kind(folder, seed, uri, chance))
        for pair in list(active):
            if time.monotonic() > end:
                pair.strikes = 0
            if pair.look(faults):
                active.remove(pair)
                ended.append(pair)
        time.sleep(0.01)
    return ended


def count(ended: list[Pair], uri: str) -> Counter[str]:
    """What the runs have lost, against their twins and in the store."""
    lost: Counter[str] = Counter()
    for pair in ended:
        pair.twin.start(0)
        for part in (pair.victim.lost(pair.twin), tracked(pair.victim, uri)):
            for what, number in part.items():
                lost[what] += number
    return lost


if __name__ == "__main__":
    main()
