"""What a person reads, word for word: the only texts in the tests that follow the wording."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atlas.config.schema import KEYS
from atlas.errors import ConfigError, nearest
from atlas.run import failures
from atlas.run.status import State, Status
from atlas.run.summary import summary
from launchers.dry_run import outline

SETTINGS: Any = SimpleNamespace(  # as far as the plan asks for them
    data=SimpleNamespace(batch_size=8),
    optim=SimpleNamespace(lr=1e-3, scale_lr="sqrt", base_batch_size=8),
    cluster=SimpleNamespace(device="auto"),
    trainer=SimpleNamespace(accumulate=4, save_interval=500, save_minutes=None, keep=2),
    effective_batch=lambda world_size: 8 * 4 * world_size,
)
LAUNCHER = SimpleNamespace(
    **{"name": "local", "nodes": 1, "nproc_per_node": 2, "world_size": 2, "sharding": None}
)


def run(state: str | None, **status: Any) -> Any:
    """A run in `state`, as far as a message asks for it."""
    found = Status(**{"step": 600, "steps": 1500, "updated": 0.0, **status})
    reads = {"judge_state": lambda: state and State(state), "read_status": lambda: found}
    return SimpleNamespace(id="0123456789", path=Path("o/a/0123456789"), **reads)


def killed() -> str:
    best = {"metric": "val/loss", "value": 0.25, "step": 500}
    last = {"train/loss": 0.5, "val/loss": 0.3, "val/time_s": 1.5}
    return summary(run("killed", reason="stopped by SIGTERM", best=best, last=last))


def failed() -> str:
    where = {"rank": 1, "host": "node-17", "step": 12, "state": "failed"}
    return failures.describe_failure({**where, "reason": "crash: ValueError: shape\nand more"})


# THE GOLDEN TEXTS: whoever changes words changes these, and no other test. (What makes it, the text.)
GOLDEN: dict[str, tuple[Callable[[], str], str]] = {
    "a problem": (
        lambda: str(ConfigError(f"trainer.steps=0 {KEYS['trainer.steps'].problem(0)}")),
        "trainer.steps=0 must be a whole number of at least 1",
    ),
    "several problems": (
        lambda: str(ConfigError(["seed=-1 is one", "optim.lr=0 is another"])),
        """\
2 problems:
  - seed=-1 is one
  - optim.lr=0 is another""",
    ),
    "a choice with a near one": (
        lambda: f"optim=adamv{nearest('adamv', ['sgd', 'adamw'])}",
        "optim=adamv; did you mean 'adamw'? There are: adamw, sgd",
    ),
    "a choice with none": (
        lambda: f"optim=x{nearest('x', ['sgd', 'adamw'])}",
        "optim=x. There are: adamw, sgd",
    ),
    "the plan": (
        lambda: outline(run(None), SETTINGS, LAUNCHER),
        """\
run              0123456789 (new)
directory        o/a/0123456789
launcher         local: 1 node(s) x 2 rank(s), device auto
effective batch  64 samples = 8 per GPU x 2 rank(s) x 4 micro-batch(es)
rate scaling     sqrt: r = 64 / 8 = 8, so the base rate is 0.001 x 2.828 = 0.002828
saves            every 500 steps, at the last step, after every validation that is the best so far; \
the newest 2 and the best are kept""",
    ),
    "a finished run": (
        lambda: summary(run("finished", step=1500)),
        """\
run 0123456789 is finished: step 1500 of 1500, 1970-01-01 00:00:00
  results o/a/0123456789
  to start over: the same command with fresh=true (this run is kept)""",
    ),
    "a killed run": (
        killed,
        """\
run 0123456789 is killed (stopped by SIGTERM): step 600 of 1500, 1970-01-01 00:00:00
  best val/loss 0.25 at step 500
  last val/loss 0.3
  results o/a/0123456789
  to resume it: the same command, or python train.py resume=0123456789""",
    ),
    "the end of a failed rank's log": (
        failed,
        "failed: rank 1 on node-17 in update 12: crash: ValueError: shape",
    ),
}


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Messages show local time."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("what", GOLDEN)
def test_golden_text(what: str) -> None:
    made, text = GOLDEN[what]
    assert made() == text
