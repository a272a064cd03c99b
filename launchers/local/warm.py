"""Imported only by the process that ranks are forked from: it imports torch once for all of them."""

import signal

import atlas.training.job  # noqa: F401  what every rank needs
from atlas.system.processes import die_with_parent

# However the launcher ends, this process ends with it, and the ranks end with this process.
die_with_parent(signal.SIGKILL)
