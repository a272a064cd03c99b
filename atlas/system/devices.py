"""The GPUs of this machine, found without torch: a process that has used CUDA cannot fork workers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


def visible_gpus() -> list[str]:
    """Return the GPUs that a child process would see, as CUDA_VISIBLE_DEVICES names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        # CUDA itself stops reading the list at the first entry that is not a device.
        names = [name.strip() for name in chosen.split(",")]
        stop = next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))
        return names[:stop]
    return [str(index) for index in range(_count())]


def _count() -> int:
    folder = Path("/proc/driver/nvidia/gpus")  # of the driver, with one folder per GPU
    if folder.is_dir():
        return len(list(folder.iterdir()))
    if not shutil.which("nvidia-smi"):  # slower, and for systems without that folder
        return 0
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())
