"""Secrets: what counts as one, and how it is masked wherever text is kept or shown."""

from __future__ import annotations

import re
from typing import Any

WORDS = ("token", "password", "secret", "api_key", "access_key")  # whole words of a key's name
MASK = "***"

# A password in a URI makes a value a secret. For masking a user name is enough: some servers take a
# token in its place.
_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@")
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")


def is_secret(key: str, value: Any) -> bool:
    """Return whether the dotted `key` is named like a secret and set, or `value` has a password."""
    last = key.rpartition(".")[2].lstrip("+~-").lower()
    if any(f"_{word}_" in f"_{last}_" for word in WORDS):
        return value not in (None, "")
    return isinstance(value, str) and _PASSWORD.search(value) is not None


def mask_argument(argument: str) -> str:
    """Return a word of a command line with a secret in it masked.

    Of arguments for Hydra itself nothing else checks whether they hold one.
    """
    key, equals, value = argument.partition("=")
    if equals and is_secret(key, value):
        return f"{key}={MASK}"
    return mask_uris(argument)


def mask_uris(text: str) -> str:
    """Return `text` with the credentials of every URI in it masked."""
    return _CREDENTIALS.sub(f"{MASK}@", text)


def without_credentials(uri: str) -> str:
    """Return `uri` without user name and password."""
    return _CREDENTIALS.sub("", uri)
