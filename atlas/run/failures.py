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

# What can end a run: `kind` in `logs/failure.json`, and the first words of the reason in `status.json`.
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


def kind_of(error: BaseException) -> str:
    """Return which of the kinds above `error` is."""
    if isinstance(error, KeyboardInterrupt):
        return STOPPED
    if isinstance(error, NonFiniteError):
        return NAN
    if isinstance(error, ConfigError):
        return CONFIG
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return MEMORY
    return MEMORY if OUT_OF_MEMORY.search(str(error)) else CRASH


def state_after(error: BaseException) -> tuple[State, str]:
    """Return the state that `error` leaves a run in, and the reason in words."""
    if isinstance(error, KeyboardInterrupt):
        return State.KILLED, "aborted by a second Ctrl-C; the last checkpoint is valid"
    return State.FAILED, f"{kind_of(error)}: {type(error).__name__}: {message(error)}"


def may_retry(kind: str, advanced: bool) -> bool:
    """Return whether to try again, without intervention, after a failure of this kind.

    A preemption: always. A crash: only if a checkpoint has `advanced` since the attempt began, since
    what breaks at the same step twice is no accident. NaN and out of memory would happen again.
    """
    return kind == PREEMPTED or (kind == CRASH and advanced)


def message(error: BaseException) -> str:
    """Return the message of `error`, without the traceback that a data worker puts into it."""
    text = str(error).strip() or "no message"
    if CAUGHT.match(text):
        return text.splitlines()[-1].partition(": ")[2] or text.splitlines()[-1]
    return text


def note_step(error: BaseException, step: int) -> None:
    """Remember with `error` that it was raised in update `step`."""
    with contextlib.suppress(AttributeError):  # a class with slots
        error.atlas_step = step  # type: ignore[attr-defined]


def record_failure(run: Run, rank: int, error: BaseException) -> None:
    """Write the failure record of the run, unless another rank has failed before.

    Ranks that fail after the first one only report that a peer is gone.
    """
    state, reason = state_after(error)
    plain = isinstance(error, AtlasError | KeyboardInterrupt)
    entry = {
        "kind": kind_of(error),
        "rank": rank,
        "step": getattr(error, "atlas_step", None),
        "state": state,
        "reason": reason,
        "message": str(error),
        "traceback": "" if plain else "".join(traceback.format_exception(error)),
    }
    _write(run, entry)


def record_exit(run: Run, rank: int, code: int) -> dict[str, Any]:
    """Write and return the record of a rank that ended with exit code `code` without a record.

    SIGKILL most likely comes from the kernel, which ends a process that takes too much memory.
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


def describe_failure(failure: Mapping[str, Any]) -> str:
    """Return one line for the end of a log: what failed, where and when."""
    step = "" if failure.get("step") is None else f" in update {failure['step']}"
    where = f"rank {failure.get('rank')} on {failure.get('host', 'unknown')}"
    first = str(failure["reason"]).splitlines()[0]
    return f"{failure.get('state')}: {where}{step}: {first}"


def _write(run: Run, entry: dict[str, Any]) -> None:
    """Write the record, unless another rank was first."""
    entry.update(time=time.time(), host=socket.gethostname())
    create_text(run.failure_file, json.dumps(entry))
