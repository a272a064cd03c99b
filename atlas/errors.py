"""What Atlas raises for a person to read, and the exit codes that a worker ends with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_STOPPED = 75  # EX_TEMPFAIL: saved, stopped, and resumable by the same command
EXIT_INTERRUPTED = 130  # left at once by a second Ctrl-C, as shells have it


class AtlasError(Exception):
    """An error whose message is all that a person needs; shown without a traceback."""


class ConfigError(AtlasError):
    """The configuration cannot be run; holds every problem that was found, one line each."""

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return f"{len(self.problems)} problems:\n" + "\n".join(f"  - {p}" for p in self.problems)


class RunBusyError(AtlasError):
    """Another live process holds the run."""


class NonFiniteError(AtlasError):
    """The loss or the gradient was NaN or infinite."""


class BadSampleError(Exception):
    """A sample that cannot be read; with a traceback, as the cause can be a person's own code."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'? There are: a, b` for an error message about an unknown name."""
    choices = sorted(set(choices))
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else "."
    return f"{hint} There are: {', '.join(choices) or 'none'}"
