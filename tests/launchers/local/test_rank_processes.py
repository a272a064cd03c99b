"""What becomes of a run when its ranks end, in whatever way."""

from __future__ import annotations

import json
import signal
import time
from multiprocessing.connection import wait

import pytest
from cheap_ranks import fork, leave, make_run, obey, wait_for

from launchers.local.ranks import Ranks, failure_text, free_port

KILL, TERM = -signal.SIGKILL, -signal.SIGTERM


def end_of(ranks: Ranks) -> int:
    deadline = time.monotonic() + 20
    while (code := ranks.poll()) is None:
        assert time.monotonic() < deadline
        wait(ranks.sentinels, 0.1)
    return code


@pytest.mark.parametrize(
    ("codes", "code", "state"),
    [
        ([0], 0, "running"),  # a rank writes how it ended itself
        ([0, 0], 0, "running"),
        ([75, 75], 75, "running"),
        ([0, 75], 75, "running"),
        ([1], 1, "failed"),
        ([0, 3], 1, "failed"),
        ([75, 1], 1, "failed"),
        ([KILL, 0], 1, "failed"),
        ([130, 130], 130, "failed"),
        ([130, 1], 130, "failed"),
    ],
)
def test_exit_code_of_a_run(run, codes, code, state):
    processes = [fork(leave, each) for each in codes]
    for process in processes:  # or the first failure to be seen would decide
        process.join()
    ranks = Ranks(run, processes)
    assert end_of(ranks) == code
    assert run.read_status().state == state
    assert ranks.sentinels == []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (3, ["crash", "rank 1", "exit code 3"]),
        (TERM, ["crash", "rank 1", "SIGTERM"]),
        (KILL, ["out of memory", "rank 1", "SIGKILL"]),
    ],
)
def test_ranks_that_wait_for_a_failed_one_are_killed(tmp_path, run, code, words):
    ready = tmp_path / "ready"
    waiting = fork(obey, ready, {})
    wait_for(ready)
    ranks = Ranks(run, [waiting, fork(leave, code)])
    assert end_of(ranks) == 1
    assert waiting.exitcode == KILL
    reason = run.read_status().reason
    assert all(word in reason for word in words), reason
    assert run.read_failure()["step"] == 7


def test_the_record_of_the_first_rank_that_failed_stays(run):
    record = {"state": "failed", "reason": "NaN: loss", "message": "loss", "traceback": ""}
    run.failure_file.write_text(json.dumps(record))
    assert end_of(Ranks(run, [fork(leave, 1), fork(leave, KILL)])) == 1
    assert run.read_status().reason == "NaN: loss"
    assert failure_text(run) == "error: loss"


def test_what_rank_0_has_recorded_stays(run):
    run.update_status(state="finished")
    assert end_of(Ranks(run, [fork(leave, 0), fork(leave, KILL)])) == 1
    assert run.read_status().state == "finished"


def test_a_run_that_another_process_holds_is_left_alone(run):
    lock = run.lock
    lock.acquire()
    try:
        assert end_of(Ranks(run, [fork(leave, 1)])) == 1
        assert "already running" in failure_text(run)
    finally:
        lock.release()
    assert run.read_status().state == "running" and run.read_failure() is None


def test_signals_reach_ranks_that_still_run(tmp_path, run):
    ready = tmp_path / "ready"
    ranks = Ranks(run, [fork(leave, 0), fork(obey, ready, {signal.SIGUSR2: 75})])
    wait_for(ready)
    assert ranks.poll() is None
    ranks.signal(signal.SIGTERM)  # which it ignores
    assert ranks.poll() is None and len(ranks.sentinels) == 1
    ranks.signal(signal.SIGUSR2)
    assert end_of(ranks) == 75
    ranks.signal(signal.SIGUSR2)  # nobody is left to hear it


@pytest.mark.parametrize(
    ("record", "parts"),
    [
        ({"traceback": "", "message": "no such key"}, ["error: no such key"]),
        (
            {"traceback": "Traceback: x", "message": "x", "rank": 2, "host": "n1"},
            ["Traceback: x", "rank 2 on n1", "rank2.log"],
        ),
        (None, ["error: broken", "logs"]),
    ],
)
def test_text_of_a_failure(tmp_path, record, parts):
    run = make_run(tmp_path / "one")
    run.update_status(state="failed", reason="broken")
    if record:
        run.failure_file.write_text(json.dumps(record))
    text = failure_text(run)
    assert all(part in text for part in parts), text


def test_ports_differ():
    assert 1024 < free_port() < 65536
