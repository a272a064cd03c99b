"""Why a run ended: its kind, who failed first and where, and whether to try again."""

from __future__ import annotations

import json
import signal
from types import SimpleNamespace

import pytest
import torch
from commands import only_run, quick, status, train, unnamed

from atlas.errors import AtlasError, BadSampleError, ConfigError, NonFiniteError
from atlas.run import failures
from atlas.run.status import Status

WORKER = """Caught BadSampleError in DataLoader worker process 1.
Original Traceback (most recent call last):
  File "x.py", line 1, in <module>
atlas.errors.BadSampleError: sample 3 cannot be read: OSError: torn"""


@pytest.mark.parametrize(
    "error, kind, state",
    [
        (NonFiniteError("x"), "NaN", "failed"),
        (ConfigError("x"), "bad configuration", "failed"),
        (MemoryError(), "out of memory", "failed"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "out of memory", "failed"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "out of memory",
            "failed",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "out of memory",
            "failed",
        ),
        (OSError(12, "Cannot allocate memory"), "out of memory", "failed"),
        (RuntimeError("shape"), "crash", "failed"),
        (AtlasError("disk"), "crash", "failed"),
        (BadSampleError("x"), "crash", "failed"),
        (KeyboardInterrupt(), "stopped", "killed"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_kinds(error, kind, state):
    assert failures.kind_of(error) == kind
    found, reason = failures.state_after(error)
    assert found == state and (
        state == "killed" or reason.startswith(f"{kind}: {type(error).__name__}: ")
    )


@pytest.mark.parametrize(
    "kind, advanced, allowed",
    [
        (failures.PREEMPTED, False, True),
        (failures.CRASH, True, True),
        (failures.CRASH, False, False),
        *((kind, True, False) for kind in (failures.NAN, failures.MEMORY, failures.CONFIG)),
    ],
)
def test_what_may_be_tried_again(kind, advanced, allowed):
    assert failures.may_retry(kind, advanced) == allowed


def test_a_data_workers_error_is_told_without_its_traceback():
    assert failures.message(RuntimeError(WORKER)) == "sample 3 cannot be read: OSError: torn"


@pytest.mark.parametrize(
    "code, kind, name",
    [
        (-signal.SIGKILL, "out of memory", "SIGKILL"),
        (-signal.SIGSEGV, "crash", "SIGSEGV"),
        (9, "crash", 9),
    ],
)
def test_a_rank_that_said_nothing(tmp_path, code, kind, name):
    run = SimpleNamespace(
        failure_file=tmp_path / "failure.json", read_status=lambda: Status(step=4)
    )
    failures.record_exit(run, 2, code)
    told = json.loads(run.failure_file.read_text())
    assert (told["kind"], told["state"], told["rank"], told["step"]) == (kind, "failed", 2, 4)
    assert told["host"] and told["reason"].startswith(kind)
    assert unnamed(told["message"], 2, name) == []


def test_the_first_record_stands(tmp_path):
    run = SimpleNamespace(failure_file=tmp_path / "failure.json")
    failures.record_failure(run, 1, ValueError("first"))
    failures.record_failure(run, 0, RuntimeError("a peer is gone"))
    assert json.loads(run.failure_file.read_text())["message"] == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["failure.json"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_run_that_failed_says_why_and_where(tmp_path, ranks):
    many = ("cluster.device=cpu", f"cluster.nproc_per_node={ranks}")
    train(*quick(tmp_path, *many, "+data.train.bad=3"), code=1)
    run = only_run(tmp_path)
    told = json.loads((run / "logs" / "failure.json").read_text())
    assert told["kind"] == "NaN" and told["host"] and told["rank"] < ranks
    assert unnamed(told["message"], told["step"], 3) == []  # the update, and the sample
    assert status(run)["state"] == "failed"
    assert status(run)["reason"].startswith("NaN: NonFiniteError: ")
    last = (run / "logs" / f"rank{told['rank']}.log").read_text().splitlines()[-1]
    assert unnamed(last, "failed", told["rank"], told["host"], told["step"], "NaN") == []


def test_code_of_a_persons_own_that_exits_has_not_finished_the_run(tmp_path):
    done = train(*quick(tmp_path, "~data.train", "+data.train={_target_: sys.exit}"), code=1)
    run = only_run(tmp_path)
    assert unnamed(done.stderr, "SystemExit", run / "logs" / "rank0.log") == []
    told = json.loads((run / "logs" / "failure.json").read_text())
    assert told["kind"] == "crash" and "SystemExit" in told["reason"]
