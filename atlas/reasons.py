"""Why a run ended, from the exception that ended it."""

from __future__ import annotations


def failure(error: BaseException) -> tuple[str, str]:
    """The state that `error` leaves a run in, and the reason in words."""
    if isinstance(error, KeyboardInterrupt):
        return "killed", "left at once by a second Ctrl-C; the last checkpoint stands"
    text = str(error).strip() or "no message"
    return "failed", f"{type(error).__name__}: {text}"
