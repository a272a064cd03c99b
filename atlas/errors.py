"""Errors that Atlas raises for the user to read, and the exit codes of a worker.

AtlasError            the message is enough: shown without a traceback
├── ConfigError       the configuration is invalid; holds every problem, one line each
├── RunBusyError      another live process writes the run
└── NonFiniteError    the loss or the gradient is NaN or infinite
BadSampleError        a sample cannot be read; shown with a traceback
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_STOPPED = 75  # EX_TEMPFAIL: saved and stopped; the same command resumes the run
EXIT_INTERRUPTED = 130  # aborted by a second Ctrl-C, with the code that shells use


class AtlasError(Exception):
    """An error whose message is all that the user needs."""


class ConfigError(AtlasError):
    """The configuration is invalid; `problems` has one line for everything that was found."""

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return f"{len(self.problems)} problems:\n" + "\n".join(f"  - {p}" for p in self.problems)


class RunBusyError(AtlasError):
    """Another live process writes the run."""


class NonFiniteError(AtlasError):
    """The loss or the gradient is NaN or infinite."""


class BadSampleError(Exception):
    """A sample cannot be read; not an AtlasError, since the cause can be in the user's code."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return `; did you mean 'x'? There are: x, y` to complete a message about an unknown name."""
    choices = sorted(set(choices))
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else "."
    return f"{hint} There are: {', '.join(choices) or 'none'}"
