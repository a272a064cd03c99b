"""Exported policies: a folder of safetensors and JSON, which cannot run code when it is read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from atlas.errors import AtlasError
from atlas.run.directory import Run
from atlas.system.files import atomic_path, write_json
from atlas.training.saving.checkpoint import Checkpoints, averaged
from atlas.version import __version__

FORMAT = 1
POLICY, WEIGHTS, PARTS = "policy.json", "model.safetensors", "parts"
# Files of weights in a pretrained part's folder. They are not copied: WEIGHTS holds the current ones.
HEAVY = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
LARGEST = 50_000_000  # bytes of the largest file that is copied from such a folder


@dataclass(frozen=True)
class SavedPolicy:
    """The content of a saved policy: configuration, the data's `spec`, updates, and weights."""

    config: Mapping[str, Any]
    spec: dict[str, Any] | None
    step: int
    weights: dict[str, torch.Tensor]


def read_run(run: Run) -> SavedPolicy:
    """Read the best weights of `run`, its averaged weights if it has them; raise `AtlasError`."""
    if not run.exists():
        raise AtlasError(
            f"{run.path} is not the directory of a run or of an export: it has neither config.yaml "
            f"nor {POLICY}; give a run's directory, or a folder that `atlas export` has written"
        )
    saved = Checkpoints(run.checkpoints).best()
    if saved is None:
        raise AtlasError(
            f"{run.checkpoints} holds no checkpoint yet; wait until the run has saved its first one"
        )
    return SavedPolicy(run.read_config(), saved["spec"], int(saved["step"]), averaged(saved))


def is_export(folder: str | Path) -> bool:
    """Return whether `folder` was written by `write`."""
    return (Path(folder) / POLICY).is_file()


def write(run: Run, out: Path) -> list[Path]:
    """Write the best policy of `run` into the new folder `out`; return its files.

    The folder can be moved and needs neither the run nor the data. If the configuration gives a
    local folder for a pretrained part, that folder's small files (sizes, tokenizer) are copied.
    """
    require_safetensors()
    from safetensors.torch import save_file

    saved = read_run(run)
    if any(make_folder(out).iterdir()):
        raise AtlasError(f"--out {out} is not empty; give a new folder")
    # Cloned, because safetensors refuses tensors that share memory.
    weights = {name: value.detach().clone().contiguous() for name, value in saved.weights.items()}
    with atomic_path(out / WEIGHTS) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    config = {
        "seed": saved.config["seed"],
        "model": copy_parts(saved.config["model"], out),
        "run": {"id": run.id, "sys_path": saved.config["run"]["sys_path"]},
    }
    content = {
        "format": FORMAT,
        "atlas": __version__,
        "run": run.id,
        "name": saved.config["name"],
        "step": saved.step,
        "code": saved.config["run"].get("code"),
        "spec": saved.spec,
        "config": config,
    }
    write_json(out / POLICY, content)
    return sorted(path for path in out.rglob("*") if path.is_file())


def make_folder(out: Path) -> Path:
    """Create the folder `out` if missing, and return it; raise `AtlasError` if not writable."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AtlasError(
            f"--out {out} cannot be created ({error.strerror}); give another folder"
        ) from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise AtlasError(f"{out} is not writable; give another folder with --out")
    return out


def read(folder: str | Path) -> SavedPolicy:
    """Read what `write` has written; raise `AtlasError` if incomplete or of another format."""
    require_safetensors()
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        content = json.loads((folder / POLICY).read_text())
        if content.get("format") != FORMAT:
            raise AtlasError(
                f"{folder / POLICY} has format={content.get('format')}, but this version of Atlas "
                f"reads format={FORMAT}; export the run again"
            )
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise AtlasError(
            f"{folder} is not a complete export ({error}); export the run again"
        ) from error
    config = content["config"]
    config["model"] = _resolve_parts(config["model"], folder)
    return SavedPolicy(config, content["spec"], int(content["step"]), weights)


def copy_parts(node: Any, out: Path, at: Sequence[str] = ()) -> Any:
    """Copy the small files of every local folder in a `path` of `node` to `out`.

    Returns `node` with the paths of the copies, relative to `out`. `at`: the keys above `node`.
    """
    if isinstance(node, Mapping):
        return {key: copy_parts(value, out, [*at, str(key)]) for key, value in node.items()}
    if at and at[-1] == "path" and isinstance(node, str) and Path(node).expanduser().is_dir():
        name = "/".join([PARTS, *at[:-1]])
        _copy_small(Path(node).expanduser(), out / name)
        return name
    return node


def _copy_small(source: Path, target: Path) -> None:
    for file in source.rglob("*"):
        inside = file.relative_to(source)
        hidden = any(part.startswith(".") for part in inside.parts)  # bookkeeping of a hub client
        if file.is_file() and not hidden and is_small(file):
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / inside)


def is_small(file: Path) -> bool:
    """Return whether a file of a pretrained part's folder is not one of weights."""
    return file.suffix not in HEAVY and file.stat().st_size <= LARGEST


def _resolve_parts(node: Any, folder: Path) -> Any:
    """Return `node` with the relative paths of `copy_parts` made absolute in `folder`."""
    if isinstance(node, Mapping):
        return {key: _resolve_parts(value, folder) for key, value in node.items()}
    if isinstance(node, str) and node.startswith(f"{PARTS}/"):
        return str((folder / node).absolute())
    return node


def require_safetensors() -> None:
    """Raise `AtlasError` with the command that installs safetensors if it is missing."""
    if find_spec("safetensors") is None:
        raise AtlasError("exported policies need safetensors: pip install safetensors")
