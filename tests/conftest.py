"""One torch thread in every test: they run side by side, and sums keep their order."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in child processes
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the hub; asked for without a network it is slow


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    """For a torch that was imported before this file."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def no_full_errors_of_hydra() -> Iterator[None]:
    """Take back what `report_errors` sets in this process: child processes would inherit it."""
    yield
    os.environ.pop("HYDRA_FULL_ERROR", None)
