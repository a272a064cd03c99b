"""Checkpoints: complete or not there, checked when read, and only tensors and plain values."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from atlas.errors import AtlasError
from atlas.run.directory import Run
from atlas.system.files import (
    HashingFile,
    atomic_path,
    describe_write_error,
    digest_of_file,
    sync_file,
    sync_folder,
)

log = logging.getLogger(__name__)

STATE = "state.pt"
META = "meta.json"
FROZEN = "frozen"
BEST = "best"


class Checkpoints:
    """The folder of a run's checkpoints: `00000500/` after 500 updates, and `best`."""

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder = folder
        self._keep = keep

    def save(self, step: int, state: Mapping[str, Any], best: int | None) -> Path:
        """Write the state after `step` updates, point `best` to its step, and drop old ones."""
        path = self.folder / f"{step:08d}"
        _write(path, state, {"step": step})
        self.point_best(best)
        self._prune(best)
        return path

    def save_frozen(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write what never changes once, beside the checkpoints that leave it out."""
        path = self.folder / FROZEN
        if tensors and not is_intact(path):
            _write(path, {"model": dict(tensors)}, {})

    def latest(self) -> dict[str, Any] | None:
        """The newest complete state; a damaged one is reported and the one before is taken."""
        for path in reversed(self.steps()):
            if is_intact(path):
                return self.read(path)
            log.warning("%s is damaged (its checksum differs); taking the one before", path)
        return None

    def repair(self) -> None:
        """Put right what a kill left: to be called by the one process that writes.

        A checkpoint that was being replaced is put back. Damaged ones that are newer than the
        newest good one are renamed: left in place they would count as the newest, and good ones
        would be dropped for them.
        """
        for old in self.folder.glob(".old-*"):
            path = self.folder / old.name.removeprefix(".old-")
            if not path.exists() and is_intact(old):
                old.rename(path)
        for half_done in (*self.folder.glob(".old-*"), *self.folder.glob(".tmp-*")):
            shutil.rmtree(half_done)
        for path in reversed(self.steps()):
            if is_intact(path):
                return
            aside = path.with_name(f"damaged-{path.name}")
            log.warning("%s is damaged (its checksum differs); set aside as %s", path, aside.name)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)

    def best(self) -> dict[str, Any] | None:
        """The state with the best validation, or the newest where nothing was validated."""
        link = self.folder / BEST
        return self.read(link.resolve()) if is_intact(link) else self.latest()

    def read(self, path: Path) -> dict[str, Any]:
        """The state in `path`, with the frozen tensors put back."""
        state = _read(path)
        frozen = self.folder / FROZEN
        if state.get("frozen"):
            if not is_intact(frozen):
                raise AtlasError(
                    f"{frozen} is missing or damaged; {path} cannot be used without it"
                )
            state["model"] = {**_read(frozen)["model"], **state["model"]}
        return state

    def steps(self) -> list[Path]:
        """The folders of complete checkpoints, oldest first."""
        if not self.folder.exists():
            return []
        return sorted(p for p in self.folder.iterdir() if p.name.isdigit())

    def point_best(self, step: int | None) -> None:
        """Let `best` be the checkpoint after `step` updates; replaced in one act."""
        if step is None or not (self.folder / f"{step:08d}").exists():
            return
        with atomic_path(self.folder / BEST, ".best") as temporary:
            temporary.symlink_to(f"{step:08d}")

    def _prune(self, best: int | None) -> None:
        kept = {p.name for p in self.steps()[-self._keep :]}
        for path in self.steps():
            if path.name not in kept and path.name != f"{best or 0:08d}":
                # Renamed first: a folder that is half removed must not look like a checkpoint.
                gone = path.with_name(f".old-{path.name}")
                shutil.rmtree(gone, ignore_errors=True)
                path.rename(gone)
                shutil.rmtree(gone)


def _write(path: Path, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """All of `state` on disk under a temporary name, then the rename that makes it count."""
    temporary = path.with_name(f".tmp-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    hashing: HashingFile | None = None
    try:
        temporary.mkdir(parents=True)
        with open(temporary / STATE, "wb") as file:
            hashing = HashingFile(file)
            torch.save(dict(state), hashing)  # type: ignore[arg-type]
            sync_file(file)
        meta = {**meta, "sha256": hashing.digest()}
        with open(temporary / META, "w") as text:
            text.write(json.dumps(meta))
            sync_file(text)
    except (OSError, RuntimeError) as error:
        reason = hashing.error if hashing and hashing.error else error
        failure = describe_write_error(path / STATE, reason)  # before the space is free again
        shutil.rmtree(temporary, ignore_errors=True)
        raise AtlasError(f"{failure}. The checkpoint before it stands") from error
    if path.exists():  # the same step again, after a restart from an earlier checkpoint
        shutil.rmtree(path.with_name(f".old-{path.name}"), ignore_errors=True)
        path.rename(path.with_name(f".old-{path.name}"))
    os.rename(temporary, path)
    sync_folder(path.parent)
    shutil.rmtree(path.with_name(f".old-{path.name}"), ignore_errors=True)


def is_intact(path: Path) -> bool:
    """Whether the state in `path` has the checksum that was taken when it was written."""
    try:
        wanted = json.loads((path / META).read_text())["sha256"]
        return bool(digest_of_file(path / STATE) == wanted)
    except (OSError, ValueError, KeyError):
        return False


def _read(path: Path) -> dict[str, Any]:
    # weights_only: a checkpoint is data, and loading it runs no code that it brings along.
    state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    return dict(state)


def best_weights(reference: str, outputs: str | Path) -> dict[str, Any]:
    """The weights of the run that `init_from` names to start another from."""
    source = Run.find(reference, outputs)
    saved = Checkpoints(source.checkpoints).best()
    if saved is None:
        raise AtlasError(f"init_from={reference}: {source.path} holds no checkpoint")
    return averaged(saved)


def load_weights(model: torch.nn.Module, state: Mapping[str, Any], origin: str) -> None:
    """Load `state` into `model`, or raise `AtlasError` listing every tensor that differs."""
    compare(model, state, origin)
    model.load_state_dict(state)


def compare(model: torch.nn.Module, state: Mapping[str, Any], origin: str) -> None:
    """Raise `AtlasError` where `state` is not `model`'s; that one may be on the meta device."""
    own = model.state_dict()
    problems = [
        *(f"  {name}: only in the model" for name in own if name not in state),
        *(f"  {name}: only in the checkpoint" for name in state if name not in own),
        *(
            f"  {name}: {tuple(state[name].shape)} in the checkpoint, {tuple(own[name].shape)} in the model"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ),
    ]
    if problems:
        shown = "\n".join(problems[:20]) + (
            f"\n  … {len(problems) - 20} more" * (len(problems) > 20)
        )
        raise AtlasError(
            f"{origin} holds the weights of another model; these tensors differ:\n{shown}"
        )


def averaged(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The weights to use a checkpoint with: the averaged ones where it has them."""
    return {**saved["model"], **(saved["ema"] or {})}
