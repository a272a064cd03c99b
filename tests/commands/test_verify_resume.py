"""`atlas verify-resume`: says yes to what is reproducible, and names what is not."""

from __future__ import annotations

import pytest
import torch
from commands import OWN, only_run, quick, train

from atlas.cli import main
from atlas.training.saving.comparison import differences

OWN_QUICK = ("--config-dir", str(OWN), "experiment=quick")


def verify(*arguments: str) -> int:
    return main(["verify-resume", *arguments])


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--steps", "20", *OWN_QUICK], marks=pytest.mark.slow),
        [*OWN_QUICK, "data.workers=1", "--kill-at", "5", "--steps", "12"],
    ],
    ids=["options first", "options last"],
)
def test_equal(capfd, arguments):
    assert verify(*arguments) == 0
    said = capfd.readouterr().out
    assert "EQUAL TO THE BIT" in said and "sample ids of" in said


def test_what_says_where_a_run_is_does_not_matter(capfd, tmp_path):
    train(*quick(tmp_path, "trainer.steps=5"))
    about = (f"outputs={tmp_path}", f"init_from={only_run(tmp_path).name}", "dry_run=true")
    assert verify("--steps", "8", *OWN_QUICK, *about) == 0
    assert "EQUAL TO THE BIT" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_equal_with_ranks(capfd, ranks):
    many = ("cluster.device=cpu", f"cluster.nproc_per_node={ranks}")
    assert verify(*OWN_QUICK, *many) == 0
    assert "EQUAL TO THE BIT" in capfd.readouterr().out


def test_a_model_that_is_not_reproducible(capfd):
    moody = ("model._target_=own_parts.Moody", "model.pause=0.005")
    assert verify(*OWN_QUICK, *moody, "--kill-at", "6") == 1
    said = capfd.readouterr().out
    assert "NOT REPRODUCIBLE" in said and "first difference (straight, resumed): step 0, " in said


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--steps", "2"], "--steps 2 must be at least 3"),
        (["--kill-at", "24"], "--kill-at 24 must be from 1 to 23"),
        ([*OWN_QUICK, "trainer.stpes=3"], "did you mean 'steps'"),
        ([*OWN_QUICK, "cluster=slurm"], "cluster=local"),
        ([*OWN_QUICK, "+data.train.bad=3"], "NaN or infinite in update"),
        ([*OWN_QUICK, "resume=0123456789"], "resume=0123456789: the check trains runs of its own"),
        ([*OWN_QUICK, "init_from=nope"], "'nope' names no run below outputs"),
    ],
    ids=["steps", "kill-at", "key", "slurm", "failing", "resume", "init_from"],
)
def test_what_cannot_be_compared(capfd, arguments, words):
    assert verify(*arguments) == 1
    assert words in capfd.readouterr().err


@pytest.mark.parametrize(
    "one, other, found",
    [
        ({"a": [1, torch.zeros(3)]}, {"a": [1, torch.zeros(3)]}, []),
        ({"a": torch.tensor([torch.nan])}, {"a": torch.tensor([torch.nan])}, []),
        ({"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])}, ["a: 1 of 1 elements differ"]),
        ({"a": {"b": torch.zeros(2)}}, {"a": {"b": torch.tensor([0, 2.0])}}, ["a.b: 1 of 2"]),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, ["a: torch.float32 [2] and"]),
        ({"a": 1}, {"b": 1}, ["a: only in the first", "b: only in the second"]),
        ([1, 2], [1, 3], ["[1]: 2 and 3"]),
        ([1], [1, 3], [": 1 and 2 entries"]),
        ({"a": None}, {"a": 0.5}, ["a: None and 0.5"]),
        (torch.zeros(()), torch.ones(()), [": 1 of 1 elements differ, the largest by 1"]),
    ],
)
def test_differences(one, other, found):
    texts = list(differences(one, other))
    assert len(texts) == len(found)
    assert all(text.startswith(start) for text, start in zip(texts, found))
