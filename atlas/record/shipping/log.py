"""Lines of `sync.log`, or of the terminal where a user typed the command."""

from __future__ import annotations

import re
import sys
import time

from atlas.config.secrets import mask_uris
from atlas.run.summary import local_time


def say(text: str) -> None:
    """Print a line with the time, without credentials."""
    print(f"{local_time(time.time())} {mask_uris(text)}", file=sys.stderr, flush=True)


def reason(error: BaseException) -> str:
    """Return an error of MLflow, its server or its database in a few words, without credentials."""
    text = str(error)
    code = re.search(r"failed with error code (\d+)|too many (\d+) error responses", text)
    if code:
        return f"it answers with HTTP status {code[1] or code[2]}"
    short = re.search(r"\[Errno -?\d+\] ([^'\")\]]+)|(Read timed out)|(database is locked)", text)
    if short:
        return str(next(filter(None, short.groups())))
    first = text.strip().partition("\n")[0] or type(error).__name__
    return mask_uris(first if len(first) <= 300 else f"{first[:300]} …")
