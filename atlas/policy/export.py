"""A policy in a folder of its own: safetensors and JSON, nothing that runs when it is read."""

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
# What a pretrained part's folder holds beside the weights, which are in WEIGHTS as they are now.
HEAVY = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
LARGEST = 50_000_000  # bytes of a file that is copied from there


@dataclass(frozen=True)
class Saved:
    """What a policy is made of: configuration, the data's `spec`, updates taken, and weights."""

    config: Mapping[str, Any]
    spec: dict[str, Any] | None
    step: int
    weights: dict[str, torch.Tensor]


def read_run(run: Run) -> Saved:
    """The best weights of `run`, averaged ones where it has them; raises `AtlasError`."""
    if not run.exists():
        raise AtlasError(
            f"{run.path} is not the directory of a run; it has no config.yaml (nor {POLICY}, "
            "as `atlas export` writes it)"
        )
    saved = Checkpoints(run.checkpoints).best()
    if saved is None:
        raise AtlasError(f"{run.checkpoints} holds no checkpoint yet")
    return Saved(run.read_config(), saved["spec"], int(saved["step"]), averaged(saved))


def is_export(folder: str | Path) -> bool:
    """Whether `folder` is what `write` has written."""
    return (Path(folder) / POLICY).is_file()


def write(run: Run, out: Path) -> list[Path]:
    """Write the best policy of `run` into the new folder `out`; returns its files.

    The folder can be moved and needs neither the run nor the data. Of pretrained parts that the
    configuration names by a local folder, the small files (sizes, tokenizer) come along.
    """
    need_safetensors()
    from safetensors.torch import save_file

    saved = read_run(run)
    if any(made(out).iterdir()):
        raise AtlasError(f"--out {out} is not empty; name a new folder")
    # Each tensor by itself: safetensors takes none that share memory.
    weights = {name: value.detach().clone().contiguous() for name, value in saved.weights.items()}
    with atomic_path(out / WEIGHTS) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    config = {
        "seed": saved.config["seed"],
        "model": with_parts(saved.config["model"], out),
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


def made(out: Path) -> Path:
    """The folder `out`, which is there from now on; `AtlasError` where it cannot be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AtlasError(f"--out {out} cannot be made ({error.strerror}); name a folder") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise AtlasError(f"{out} cannot be written to; name another folder with --out")
    return out


def read(folder: str | Path) -> Saved:
    """What `write` has written; raises `AtlasError` where it is incomplete or of another format."""
    need_safetensors()
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        content = json.loads((folder / POLICY).read_text())
        if content.get("format") != FORMAT:
            raise AtlasError(
                f"{folder / POLICY} has format={content.get('format')}, and this Atlas reads "
                f"{FORMAT}; export the run again"
            )
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise AtlasError(
            f"{folder} is no complete export ({error}); export the run again"
        ) from error
    config = content["config"]
    config["model"] = _resolved(config["model"], folder)
    return Saved(config, content["spec"], int(content["step"]), weights)


def with_parts(node: Any, out: Path, at: Sequence[str] = ()) -> Any:
    """`node` with every `path` of a local folder replaced by a copy of its small files in `out`."""
    if isinstance(node, Mapping):
        return {key: with_parts(value, out, [*at, str(key)]) for key, value in node.items()}
    if at and at[-1] == "path" and isinstance(node, str) and Path(node).expanduser().is_dir():
        name = "/".join([PARTS, *at[:-1]])
        _copy_small(Path(node).expanduser(), out / name)
        return name
    return node


def _copy_small(source: Path, target: Path) -> None:
    for file in source.rglob("*"):
        inside = file.relative_to(source)
        hidden = any(part.startswith(".") for part in inside.parts)  # a hub client's own
        if file.is_file() and not hidden and is_small(file):
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / inside)


def is_small(file: Path) -> bool:
    """Whether a file of a pretrained part's folder is something else than weights."""
    return file.suffix not in HEAVY and file.stat().st_size <= LARGEST


def _resolved(node: Any, folder: Path) -> Any:
    """`node` with what `with_parts` has replaced as paths in `folder`."""
    if isinstance(node, Mapping):
        return {key: _resolved(value, folder) for key, value in node.items()}
    if isinstance(node, str) and node.startswith(f"{PARTS}/"):
        return str((folder / node).absolute())
    return node


def need_safetensors() -> None:
    """Raise `AtlasError` with the command where the package is not there."""
    if find_spec("safetensors") is None:
        raise AtlasError("exported policies need safetensors: pip install safetensors")
