"""What each part may import: the submitting side stays cheap, and each library has its few places."""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "mlflow", "transformers", "matplotlib", "submitit", "pyarrow", "av")
PROBE = f"""
import json, runpy, sys
def seen():
    print("LOADED " + json.dumps([m for m in {HEAVY!r} if m in sys.modules]), file=sys.stderr)
"""
COMMAND_LINE = """
import atexit
atexit.register(seen)
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""
SOURCES = sorted(
    path
    for path in [*ROOT.glob("*.py"), *ROOT.glob("atlas/**/*.py"), *ROOT.glob("launchers/**/*.py")]
    if "__pycache__" not in path.parts
)


def python(code: str, *arguments: str, cwd: Path = ROOT) -> list[str]:
    """The heavy modules that running `code` has loaded."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE + code, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("LOADED ")]
    assert lines, done.stderr
    return json.loads(lines[-1].removeprefix("LOADED "))


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "train.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@functools.cache
def imports(path: Path, module_level: bool = False) -> list[str]:
    """Dotted names that a file imports, less those for type checkers alone."""
    found: list[str] = []
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found += (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
        elif not (module_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            nodes += ast.iter_child_nodes(node)
    return found


def files_importing(library: str, module_level: bool = False) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(f"{name}.".startswith(f"{library}.") for name in imports(path, module_level))
    }


@pytest.mark.parametrize(
    "module",
    [
        "atlas",
        "atlas.run.directory",
        "atlas.config.checks",
        "atlas.run.summary",
        "atlas.worker",
        "atlas.cli",
        "atlas.record.shipping.shipper",
        "launchers.launch",
        "train",
    ],
)
def test_importing_the_submitting_side_is_cheap(module):
    assert python(f"import {module}; seen()") == []


def test_a_finished_run_issued_again_loads_nothing_heavy(tmp_path):
    command = [
        f"outputs={tmp_path}",
        "tracking=none",
        "trainer.steps=1",
        "trainer.accumulate=1",
        "schedule.warmup=0",
        "data.episodes=3",
        "data.val=null",
    ]
    first = train(*command)
    assert first.returncode == 0, first.stderr
    assert python(COMMAND_LINE, *command) == []


def test_a_wrong_command_loads_nothing_heavy(tmp_path):
    assert python(COMMAND_LINE, f"outputs={tmp_path}", "trainer.steps=0") == []


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("torch", ("atlas/training/", "atlas/policy/", "atlas/models/", "atlas/data/")),
        ("mlflow", ("atlas/record/shipping/mlflow_",)),
        ("submitit", ("launchers/slurm/sbatch.py", "launchers/slurm/task.py")),
        ("transformers", ("atlas/models/",)),
        ("pyarrow", ("atlas/data/lerobot/",)),
        ("av", ("atlas/data/lerobot/",)),
        ("matplotlib", ("atlas/record/figure.py", "atlas/policy/trajectories.py")),
        (
            "hydra",
            (
                "train.py",
                "atlas/train.py",
                "launchers/launch.py",
                "launchers/hydra_errors.py",
                "launchers/plugins/hydra_plugins/",
                "atlas/training/build.py",
            ),
        ),
    ],
)
def test_a_library_has_its_places(library, allowed):
    strangers = {f for f in files_importing(library) if not f.startswith(allowed)}
    assert strangers == set()


def test_the_scan_sees_what_is_there():
    assert "atlas/training/optimization/gradient.py" in files_importing("torch")
    assert "atlas/record/shipping/mlflow_store.py" in files_importing("mlflow")
    assert "atlas/worker.py" in files_importing("atlas.training")


# What each room may import besides itself: the floors, from the ground up.
GROUND = ("atlas.errors", "atlas.protocol", "atlas.version", "atlas.schedule")
SYSTEM = (*GROUND, "atlas.system")
CONFIG = (*SYSTEM, "atlas.config")
RUN = (*CONFIG, "atlas.run")
RECORD = (*RUN, "atlas.record")
TRAINING = (*RECORD, "atlas.data", "atlas.models", "atlas.training")
POLICY = (*TRAINING, "atlas.policy")
FLOORS = {
    "atlas/system/": SYSTEM,
    "atlas/data/": (*SYSTEM, "atlas.data"),
    "atlas/models/": (*SYSTEM, "atlas.models"),
    "atlas/config/": CONFIG,
    "atlas/run/": RUN,
    "atlas/record/": RECORD,
    "atlas/training/": TRAINING,
    "atlas/policy/": POLICY,
    "atlas/worker.py": TRAINING,
    "atlas/commands/": (*POLICY, "atlas.commands"),
}


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_stands_on_the_floors_below_it(room):
    files = [path for path in SOURCES if str(path.relative_to(ROOT)).startswith(room)]
    assert files
    upwards = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in imports(path)
        if name.startswith(("atlas", "launchers"))
        and not any(f"{name}.".startswith(f"{below}.") for below in FLOORS[room])
    }
    assert upwards == set()


@pytest.mark.parametrize("folder", sorted({str(path.parent.relative_to(ROOT)) for path in SOURCES}))
def test_a_room_has_ten_files_at_most(folder):
    inside = [path for path in SOURCES if path.parent == ROOT / folder]
    assert len([path for path in inside if path.name != "__init__.py"]) <= 10


def test_imports_run_one_way():
    upwards = {f for f in files_importing("launchers") if f.startswith("atlas/")}
    assert upwards <= {"atlas/train.py"}  # a command line, like train.py
    assert files_importing("train") == set()


def test_training_is_entered_inside_functions():
    entered = files_importing("atlas.training", module_level=True)
    above = ("atlas/training/", "atlas/policy/", "launchers/local/warm.py")
    # warm.py is imported only by the process that ranks are forked from.
    assert {f for f in entered if not f.startswith(above)} == set()


def test_there_is_no_utils():
    assert [path for path in SOURCES if path.stem in ("utils", "util", "helpers", "common")] == []
