"""Imported by the process that ranks are forked from, and by no other: torch once, and a leash."""

import signal

from atlas.leash import die_with_parent
from atlas.stop import ASKED

# However the launcher ends, this process ends with it, and the ranks with this process.
die_with_parent(signal.SIGKILL)
# So it must outlive what asks all processes to stop, as Slurm, `timeout` and a terminal do.
for number in ASKED:
    signal.signal(number, signal.SIG_IGN)

import atlas.training.job  # noqa: E402, F401  what every rank needs
