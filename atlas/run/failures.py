"""Why a run ended: which rank was the first to fail, with what."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import time
import traceback
from collections.abc import Mapping
from typing import Any

from atlas.errors import AtlasError, ConfigError, NonFiniteError
from atlas.run.directory import Run
from atlas.run.status import State
from atlas.system.files import create_text

# What can end a run, as `kind` in `logs/failure.json` and the first words of the status's reason.
STOPPED = "stopped"
PREEMPTED = "preempted"
CRASH = "crash"
NAN = "NaN"
MEMORY = "out of memory"
CONFIG = "bad configuration"
# torch is not imported to ask for its exception; some of its allocators raise a RuntimeError.
OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|is killed by signal: Killed",
    re.IGNORECASE,
)
CAUGHT = re.compile(r"Caught \w+ in .*\n.*Traceback", re.MULTILINE)  # in a data worker


def kind(error: BaseException) -> str:
    """Which of the kinds above `error` is."""
    if isinstance(error, KeyboardInterrupt):
        return STOPPED
    if isinstance(error, NonFiniteError):
        return NAN
    if isinstance(error, ConfigError):
        return CONFIG
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return MEMORY
    return MEMORY if OUT_OF_MEMORY.search(str(error)) else CRASH


def failure(error: BaseException) -> tuple[State, str]:
    """The state that `error` leaves a run in, and the reason in words."""
    if isinstance(error, KeyboardInterrupt):
        return State.KILLED, "left at once by a second Ctrl-C; the last checkpoint stands"
    return State.FAILED, f"{kind(error)}: {type(error).__name__}: {message(error)}"


def may_retry(kind: str, advanced: bool) -> bool:
    """Whether a failure of this kind may be tried again without a person's doing.

    A preemption always. A crash only if a checkpoint has `advanced` since the attempt began: what
    breaks at the same place again is no accident. What is not finite or too large would be so again.
    """
    return kind == PREEMPTED or (kind == CRASH and advanced)


def message(error: BaseException) -> str:
    """What `error` says; of one that was raised in a data worker, without its traceback."""
    text = str(error).strip() or "no message"
    if CAUGHT.match(text):
        return text.splitlines()[-1].partition(": ")[2] or text.splitlines()[-1]
    return text


def at_step(error: BaseException, step: int) -> None:
    """Note with `error` that it was raised in update `step`."""
    with contextlib.suppress(AttributeError):  # a class without room for it
        error.atlas_step = step  # type: ignore[attr-defined]


def record(run: Run, rank: int, error: BaseException) -> None:
    """Write the run's failure record, if no other rank has failed before.

    The ranks that fail after the first only tell that a peer is gone.
    """
    state, reason = failure(error)
    plain = isinstance(error, AtlasError | KeyboardInterrupt)
    entry = {
        "kind": kind(error),
        "rank": rank,
        "step": getattr(error, "atlas_step", None),
        "state": state,
        "reason": reason,
        "message": str(error),
        "traceback": "" if plain else "".join(traceback.format_exception(error)),
    }
    _write(run, entry)


def record_end(run: Run, rank: int, code: int) -> dict[str, Any]:
    """Write and return the record of a rank that ended with exit code `code` and said nothing.

    The kernel ends with SIGKILL what takes too much memory, and nobody else is likely to.
    """
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    killed = code == -signal.SIGKILL
    hint = "; the machine is likely to be out of memory" if killed else ""
    what = MEMORY if killed else CRASH
    text = f"rank {rank} was ended by {name}{hint}"
    entry = {
        "kind": what,
        "rank": rank,
        "step": run.read_status().step,
        "state": State.FAILED,
        "reason": f"{what}: {text}",
        "message": text,
        "traceback": "",
    }
    _write(run, entry)
    return entry


def summary(failure: Mapping[str, Any]) -> str:
    """One line for the end of a log: what, where and when."""
    step = "" if failure.get("step") is None else f" in update {failure['step']}"
    where = f"rank {failure.get('rank')} on {failure.get('host', 'unknown')}"
    first = str(failure["reason"]).splitlines()[0]
    return f"{failure.get('state')}: {where}{step}: {first}"


def _write(run: Run, entry: dict[str, Any]) -> None:
    """Write the record, unless another rank was first."""
    entry.update(time=time.time(), host=socket.gethostname())
    create_text(run.failure_file, json.dumps(entry))
