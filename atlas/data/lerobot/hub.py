"""Data sets on the Hugging Face hub; a local folder of the same name takes precedence."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from atlas.errors import ConfigError

NAME = re.compile(r"[\w.-]+/[\w.-]+")  # organisation/data-set


def is_hub_name(root: str) -> bool:
    """Return whether `root` could be the name of a data set on the hub."""
    return NAME.fullmatch(root) is not None and not root.startswith(".")


def find_root(root: str | Path, revision: str | None) -> Path:
    """Return the folder `root`, or the local copy of the hub's data set of that name.

    Files in the hub's cache are not downloaded again. Raises ConfigError if neither exists, and
    for a name on the hub without `revision`, because the data could change during the run.
    """
    folder = Path(root).expanduser()
    if folder.exists():
        if revision is not None:
            raise ConfigError(
                f"data.revision={revision} is for data sets on the hub, but data.root={root} is "
                "a folder; set data.revision=null"
            )
        return folder
    if not is_hub_name(str(root)):
        raise ConfigError(f"data.root={root}: no such folder; give the one that holds meta/")
    if revision is None:
        raise ConfigError(
            f"data.root={root} is not a folder; if it is a data set on the hub, set its revision: "
            "data.revision=TAG_OR_COMMIT (LeRobot tags its formats, for example v3.0)"
        )
    return _download(str(root), revision)


def _download(name: str, revision: str) -> Path:
    download = f"hf download {name} --repo-type dataset --revision {revision} --local-dir FOLDER"
    if find_spec("huggingface_hub") is None:
        raise ConfigError(
            f"data.root={name} is not a folder, and downloading it from the hub needs "
            "huggingface_hub: pip install huggingface_hub"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision))
    except Exception as error:  # errors of the client, of httpx, and OSError
        raise ConfigError(
            f"data.root={name} with data.revision={revision} cannot be downloaded from the hub "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); download it on a machine "
            f"with a network ({download}) and set data.root=FOLDER"
        ) from error
