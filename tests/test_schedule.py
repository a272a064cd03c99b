"""Schedules: pure functions of the step, held against seed.md's numbers and against transformers."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
from pathlib import Path

import pytest

from atlas.schedule import Constant, Cosine, LearningRate, Linear

ROOT = Path(__file__).resolve().parents[1]
EVERY = (Cosine, Linear, Constant)


@pytest.mark.parametrize("schedule", EVERY)
@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.0), (250, 2.5e-5), (500, 5e-5), (750, 7.5e-5), (1000, 1e-4)]
)
def test_warm_up_has_the_numbers_of_the_seed(schedule, step, rate):
    assert 1e-4 * schedule(warmup=1000)(step, 10_000) == pytest.approx(rate, rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("schedule", "step", "factor"),
    [
        # 0, the warm-up, half of the decay, the last step, total, total + 1
        (Cosine(100), 0, 0.0),
        (Cosine(100), 99, 0.99),
        (Cosine(100), 100, 1.0),
        (Cosine(100), 550, 0.5),
        (Cosine(100), 999, 3.046e-6),
        (Cosine(100), 1000, 0.0),
        (Cosine(100), 1001, 0.0),
        (Cosine(100, floor=0.1), 100, 1.0),
        (Cosine(100, floor=0.1), 550, 0.55),
        (Cosine(100, floor=0.1), 1000, 0.1),
        (Cosine(100, floor=0.1), 1001, 0.1),
        (Cosine(100, floor=1.0), 777, 1.0),
        (Linear(100), 0, 0.0),
        (Linear(100), 100, 1.0),
        (Linear(100), 325, 0.75),
        (Linear(100), 1000, 0.0),
        (Linear(100), 1001, 0.0),
        (Linear(100, floor=0.2), 550, 0.6),
        (Linear(100, floor=0.2), 1000, 0.2),
        (Constant(100), 50, 0.5),
        (Constant(100), 100, 1.0),
        (Constant(100), 1000, 1.0),
        (Constant(100), 1001, 1.0),
        # no warm-up: the first update has the whole rate
        (Cosine(0), 0, 1.0),
        (Cosine(0), 500, 0.5),
        (Linear(0), 0, 1.0),
        (Constant(0), 0, 1.0),
        # nothing is left to decay over
        (Cosine(1000), 999, 0.999),
        (Cosine(1000), 1000, 1.0),
    ],
)
def test_factor(schedule, step, factor):
    assert schedule(step, 1000) == pytest.approx(factor, rel=1e-3, abs=1e-12)


def test_warm_up_ignores_the_floor():
    assert Cosine(10, floor=0.5)(0, 100) == 0.0


@pytest.mark.parametrize("schedule", [Cosine(7, 0.1), Linear(7, 0.1), Constant(7)])
def test_steps_can_be_asked_for_in_any_order(schedule):
    before = [schedule(step, 50) for step in range(60)]
    steps = random.Random(0).sample(range(60), 60)
    assert {step: schedule(step, 50) for step in steps} == dict(enumerate(before))
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.warmup = 3


@pytest.mark.parametrize("schedule", EVERY)
def test_never_negative_and_never_above_the_rate(schedule):
    factors = [schedule(warmup=13, floor=0.0)(step, 101) for step in range(150)]
    assert min(factors) >= 0 and max(factors) == 1.0 and factors.index(1.0) == 13


def test_one_rule_gives_every_module_its_rate():
    rate = LearningRate(base=2e-4, schedule=Linear(4, 0.5), steps=12)
    multipliers = {"vision": 0.0, "lang_encoder": 0.1, "action_head": 1.0}
    assert rate.rates(0, multipliers) == dict.fromkeys(multipliers, 0.0)
    assert rate.rates(4, multipliers) == pytest.approx(
        {"vision": 0.0, "lang_encoder": 2e-5, "action_head": 2e-4}
    )
    assert rate.rates(8, multipliers)["action_head"] == pytest.approx(1.5e-4)


def test_standard_library_only():
    code = "import sys, atlas.schedule; print(*sys.stdlib_module_names & set(sys.modules)); "
    code += "print(*{m.split('.')[0] for m in sys.modules} - sys.stdlib_module_names)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert set(done.stdout.splitlines()[1].split()) <= {"atlas", "__main__"}


@pytest.mark.parametrize(
    ("warmup", "total"), [(0, 40), (1, 40), (10, 100), (99, 100), (1000, 3000)]
)
@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_equals_transformers_at_every_step(kind, warmup, total):
    pytest.importorskip("transformers", reason="transformers is not installed (extra vla)")
    torch = pytest.importorskip("torch")
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    ours, theirs = {
        "cosine": (Cosine, get_cosine_schedule_with_warmup),
        "linear": (Linear, get_linear_schedule_with_warmup),
    }[kind]
    schedule = ours(warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    other = theirs(optimizer, warmup, total)
    for step in range(total):
        rate = optimizer.param_groups[0]["lr"]
        assert 1e-4 * schedule(step, total) == pytest.approx(rate, rel=1e-9, abs=1e-19), step
        optimizer.step()
        other.step()
