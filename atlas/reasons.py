"""Why a run ended, from the exception that ended it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import traceback

from atlas.errors import AtlasError
from atlas.run import Run


def failure(error: BaseException) -> tuple[str, str]:
    """The state that `error` leaves a run in, and the reason in words."""
    if isinstance(error, KeyboardInterrupt):
        return "killed", "left at once by a second Ctrl-C; the last checkpoint stands"
    text = str(error).strip() or "no message"
    return "failed", f"{type(error).__name__}: {text}"


def record(run: Run, rank: int, error: BaseException) -> None:
    """Write the run's failure record, if no other rank has failed before.

    The ranks that fail after the first only tell that a peer is gone.
    """
    state, reason = failure(error)
    plain = isinstance(error, AtlasError | KeyboardInterrupt)
    entry = {
        "time": time.time(),
        "rank": rank,
        "host": socket.gethostname(),
        "state": state,
        "reason": reason,
        "message": str(error),
        "traceback": "" if plain else "".join(traceback.format_exception(error)),
    }
    temporary = run.failure_file.with_suffix(f".{rank}")
    temporary.write_text(json.dumps(entry))
    with contextlib.suppress(FileExistsError):
        os.link(temporary, run.failure_file)
    temporary.unlink()
