"""Data sets by their name on the Hugging Face hub; a folder of that name comes first."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from atlas.errors import ConfigError

NAME = re.compile(r"[\w.-]+/[\w.-]+")  # organisation/data-set


def looks_like_name(root: str) -> bool:
    """Whether `root` could be a data set on the hub."""
    return NAME.fullmatch(root) is not None and not root.startswith(".")


def find_root(root: str | Path, revision: str | None) -> Path:
    """The folder `root`, or the local copy of the hub's data set of that name at `revision`.

    What is in the hub's cache is not fetched again. Raises ConfigError where there is neither, and
    for a hub name without a revision: what it names would change under the run.
    """
    folder = Path(root).expanduser()
    if folder.exists():
        if revision is not None:
            raise ConfigError(
                f"data.revision={revision} is for data sets on the hub, and data.root={root} is "
                "a folder; leave data.revision=null"
            )
        return folder
    if not looks_like_name(str(root)):
        raise ConfigError(f"data.root={root}: no such folder; give the one that holds meta/")
    if revision is None:
        raise ConfigError(
            f"data.root={root} is no folder here; if it is a data set on the hub, say which state "
            "of it the run is about: data.revision=TAG_OR_COMMIT (LeRobot tags its formats, as v3.0)"
        )
    return _download(str(root), revision)


def _download(name: str, revision: str) -> Path:
    fetch = f"hf download {name} --repo-type dataset --revision {revision} --local-dir FOLDER"
    if find_spec("huggingface_hub") is None:
        raise ConfigError(
            f"data.root={name} is no folder here, and to fetch it from the hub needs "
            "huggingface_hub: pip install huggingface_hub"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision))
    except Exception as error:  # the client's own, httpx's, and OSError
        raise ConfigError(
            f"data.root={name} with data.revision={revision} cannot be fetched from the hub "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); fetch it where there is a "
            f"network, {fetch}, and give data.root=FOLDER"
        ) from error
