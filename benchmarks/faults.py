"""Faults injected into small runs for real: what was struck, where, how often, and what was lost.

python benchmarks/faults.py

Every victim is started again after each fault until it has finished, and is then compared to the
bit with a twin that nothing happened to. Prints the table of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from measure import heading
from victims import Victim

STEPS = 160
HEAVY = ("model._target_=own_parts.Heavy", "+model.ballast=2", "trainer.keep=1")
KILL, TERM, USR2 = signal.SIGKILL, signal.SIGTERM, signal.SIGUSR2


@dataclass
class Row:
    """One line of the table; `lost` counts what the twins have and the victims have not."""

    fault: str
    where: str
    tried: int = 0
    repeated: int = 0
    lost: dict[str, int] = field(default_factory=dict)

    def add(self, victim: Victim, twin: Victim) -> None:
        """Take in a victim that has finished."""
        self.repeated += victim.repeated
        for what, count in victim.lost(twin).items():
            self.lost[what] = self.lost.get(what, 0) + count

    def text(self) -> str:
        """As a row in Markdown."""
        lost = ", ".join(f"{count} {what}" for what, count in self.lost.items() if count)
        return f"| {self.fault} | {self.where} | {self.tried} | {self.repeated} | {lost or 'nothing'} |"


@dataclass(frozen=True)
class Place:
    """A moment of a run: `ready(victim, saved)` says it is near, `delay` is the most to wait then."""

    ready: Callable[[Victim, int], bool]
    delay: float
    slow: tuple[str, ...]


def further(victim: Victim, saved: int) -> bool:
    """A checkpoint was written since the last start."""
    return victim.saved() > saved


def saving(victim: Victim, saved: int) -> bool:
    """A checkpoint is being written, and one was since the last start."""
    return further(victim, saved) and any(victim.outputs.glob("*/*/checkpoints/.tmp-*"))


def begun(victim: Victim, saved: int) -> bool:
    """The process holds the lock."""
    assert victim.process
    lock = next(victim.outputs.glob("*/*/lock.json"), None)
    return lock is not None and f'"pid": {victim.process.pid},' in lock.read_text()


PAUSE = ("model.pause=0.004", "trainer.save_interval=4")
PLACES = {
    "in a step": Place(further, 0.03, PAUSE),
    "in validation": Place(
        further,
        0.03,
        ("+data.val.delay=0.002", "trainer.val_interval=2", "trainer.save_interval=2"),
    ),
    "while saving": Place(saving, 0.01, (*HEAVY, "trainer.save_interval=4")),
    "before the first step": Place(begun, 0.05, PAUSE),
}


def struck(
    row: Row, folder: Path, number: int, place: Place, times: int, chance: random.Random, *more: str
) -> Victim:
    """A victim that was struck `times` times, and then ran to its end."""
    victim = Victim(folder, f"trainer.steps={STEPS}", *place.slow, *more)
    for _ in range(times):
        saved = victim.saved() if victim.outputs.exists() else 0
        victim.start()
        if victim.until(lambda: place.ready(victim, saved)):  # noqa: B023
            time.sleep(chance.uniform(0, place.delay))
            row.tried += victim.strike(number)
        if not victim.outputs.exists() or victim.saved() >= STEPS:
            break
    victim.start(0)
    return victim


def signals(folder: Path, times: int, chance: random.Random) -> Iterator[Row]:
    """SIGKILL, SIGTERM and SIGUSR2 in every place."""
    twins: dict[tuple[str, ...], Victim] = {}
    for number, where in [(s, w) for w in PLACES for s in (KILL, TERM, USR2)]:
        place = PLACES[where]
        row = Row(signal.Signals(number).name, where)
        if place.slow not in twins:
            twins[place.slow] = Victim(
                folder / f"twin{len(twins)}", f"trainer.steps={STEPS}", *place.slow
            )
            twins[place.slow].start(0)
        attempt = 0
        while row.tried < (times if number == KILL else times // 3) and attempt < times:
            attempt += 1
            name = f"{row.fault}-{where}-{attempt}".replace(" ", "_")
            wanted = (times if number == KILL else times // 3) - row.tried
            victim = struck(row, folder / name, number, place, wanted, chance)
            row.add(victim, twins[place.slow])
            shutil.rmtree(victim.outputs, ignore_errors=True)  # its report may still be drawn
        yield row


def of_ranks(folder: Path, times: int, chance: random.Random) -> Iterator[Row]:
    """SIGKILL to the launcher and to a rank of 2."""
    many = ("cluster.device=cpu", "cluster.nproc_per_node=2", "data.workers=1")
    twin = Victim(folder / "twin-ranks", f"trainer.steps={STEPS}", *PAUSE, *many)
    twin.start(0)
    row = Row("SIGKILL", "2 ranks with data workers, in a step")
    victim = struck(row, folder / "ranks", KILL, PLACES["in a step"], times, chance, *many)
    row.add(victim, twin)
    yield row


def full_disk(folder: Path, times: int) -> Iterator[Row]:
    """No room for a checkpoint, on a small file system of its own."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        print("a full disk was not tried: mounting a small tmpfs takes root")
        return
    try:
        yield _filled(folder, disk, times)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def _filled(folder: Path, disk: Path, times: int) -> Row:
    # Every attempt gets two checkpoints further.
    steps = 12 * times
    slow = (*HEAVY, "model.pause=0.005", "trainer.save_interval=4", f"trainer.steps={steps}")
    twin = Victim(folder / "twin-disk", *slow)
    twin.start(0)
    row = Row("full disk", "while saving")
    victim = Victim(disk / "o", *slow)
    for _ in range(times):
        saved = victim.saved() if victim.outputs.exists() else 0
        victim.start()
        if victim.until(lambda: further(victim, saved)):  # noqa: B023
            row.tried += fill_until_it_ends(victim, disk) == 1
        if victim.saved() >= steps:
            break
    victim.start(0)
    row.add(victim, twin)
    return row


def fill_until_it_ends(victim: Victim, disk: Path) -> int | None:
    """Leave too little for a checkpoint, also of what the removal of older ones sets free."""
    filler = disk / "filler"
    assert victim.process
    while victim.process.poll() is None:
        room = shutil.disk_usage(disk).free - 4_000_000
        if room > 0:
            with open(filler, "ab") as file, contextlib.suppress(OSError):
                file.write(b"x" * room)
        time.sleep(0.005)
    filler.unlink()
    return victim.process.poll()


def damaged(folder: Path, times: int, chance: random.Random) -> Iterator[Row]:
    """The newest checkpoint truncated, or a bit of it turned over."""
    twin = Victim(folder / "twin-damaged", f"trainer.steps={STEPS}", *PAUSE)
    twin.start(0)
    for what in ("truncated", "a bit flipped"):
        row = Row(f"checkpoint {what}", "between two starts")
        victim = Victim(folder / what.replace(" ", "_"), f"trainer.steps={STEPS}", *PAUSE)
        for _ in range(times):
            saved = victim.saved() if victim.outputs.exists() else 0
            victim.start()
            if not victim.until(lambda: victim.saved() >= saved + 8):  # noqa: B023
                break
            victim.strike()
            newest = max(victim.outputs.glob("*/*/checkpoints/[0-9]*")) / "state.pt"
            data = bytearray(newest.read_bytes())
            at = chance.randrange(len(data))
            data[at] ^= 1 << chance.randrange(8)
            newest.write_bytes(data[:at] if what == "truncated" else data)
            row.tried += 1
        victim.start(0)
        for path in victim.outputs.glob("*/*/checkpoints/damaged-*"):
            shutil.rmtree(path)
        row.add(victim, twin)
        yield row


def main() -> None:
    """All rows, each as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=30, help="SIGKILLs in each place")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    print(f"{heading('Faults')}\n", flush=True)
    print(
        "| fault | where | tried | updates taken again | lost |\n|---|---|---|---|---|", flush=True
    )
    began, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="atlas-faults-") as name:
        folder = Path(name)
        some = max(2, args.times // 3)
        for rows_of in (
            signals(folder, args.times, chance),
            of_ranks(folder, some, chance),
            damaged(folder, some, chance),
            full_disk(folder, some),
        ):
            for row in rows_of:
                rows.append(row)
                print(row.text(), flush=True)
    tried, lost = sum(row.tried for row in rows), sum(sum(row.lost.values()) for row in rows)
    took = (time.monotonic() - began) / 60
    print(f"\n{tried} faults in {took:.1f} min, lost: {lost or 'nothing'}")
    raise SystemExit(1 if lost else 0)


if __name__ == "__main__":
    main()
