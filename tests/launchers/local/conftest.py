"""A run for ranks that are cheap processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from cheap_ranks import make_run

from atlas.run.directory import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run whose status is running, although nothing has its lock."""
    return make_run(tmp_path / "run")
