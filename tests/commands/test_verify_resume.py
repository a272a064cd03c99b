"""`atlas verify-resume`: says yes to what is reproducible, and names what is not."""

from __future__ import annotations

import pytest
import torch
from commands import OWN, only_run, quick, train, unnamed

from atlas.cli import main
from atlas.training.saving.comparison import differences

OWN_QUICK = ("--config-dir", str(OWN), "experiment=quick")


def verify(*arguments: str) -> int:
    return main(["verify-resume", *arguments])


@pytest.mark.parametrize(
    "arguments, steps",
    [
        pytest.param(["--steps", "20", *OWN_QUICK], 20, marks=pytest.mark.slow),
        ([*OWN_QUICK, "data.workers=1", "--kill-at", "5", "--steps", "12"], 12),
    ],
    ids=["options first", "options last"],
)
def test_equal(capfd, arguments, steps):
    assert verify(*arguments) == 0
    verdict = capfd.readouterr().out.splitlines()[-1]
    assert unnamed(verdict, steps, steps) == []  # trained, and compared sample by sample


def test_what_says_where_a_run_is_does_not_matter(capfd, tmp_path):
    train(*quick(tmp_path, "trainer.steps=5"))
    about = (f"outputs={tmp_path}", f"init_from={only_run(tmp_path).name}", "dry_run=true")
    assert verify("--steps", "8", *OWN_QUICK, *about) == 0
    assert unnamed(capfd.readouterr().out.splitlines()[-1], 8, 8) == []


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_equal_with_ranks(capfd, ranks):
    many = ("cluster.device=cpu", f"cluster.nproc_per_node={ranks}")
    assert verify(*OWN_QUICK, *many) == 0
    assert unnamed(capfd.readouterr().out.splitlines()[-1], 24, 24) == []


def test_a_model_that_is_not_reproducible(capfd):
    moody = ("model._target_=own_parts.Moody", "model.pause=0.005")
    assert verify(*OWN_QUICK, *moody, "--kill-at", "6") == 1
    said = capfd.readouterr().out
    assert unnamed(said, 0, "grad_norm", "trainer.deterministic=true") == []


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--steps", "2"], ["--steps 2", 3]),
        (["--kill-at", "24"], ["--kill-at 24", 1, 23]),
        ([*OWN_QUICK, "trainer.stpes=3"], ["trainer.stpes", "steps", "steps"]),
        ([*OWN_QUICK, "cluster=slurm"], ["cluster=local"]),
        ([*OWN_QUICK, "+data.train.bad=3"], ["Points", 3, "y"]),
        ([*OWN_QUICK, "resume=0123456789"], ["resume=0123456789"]),
        ([*OWN_QUICK, "init_from=nope"], ["nope", "outputs"]),
    ],
    ids=["steps", "kill-at", "key", "slurm", "failing", "resume", "init_from"],
)
def test_what_cannot_be_compared(capfd, arguments, parts):
    assert verify(*arguments) == 1
    told = capfd.readouterr().err
    assert unnamed(told, *parts) == []


# Two states, and for each place where they differ its path and what is named of the difference.
DIFFERENCES = [
    ({"a": [1, torch.zeros(3)]}, {"a": [1, torch.zeros(3)]}, {}),
    ({"a": torch.tensor([torch.nan])}, {"a": torch.tensor([torch.nan])}, {}),
    ({"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])}, {"a": [1, 1]}),
    ({"a": {"b": torch.zeros(2)}}, {"a": {"b": torch.tensor([0, 2.0])}}, {"a.b": [1, 2, 2]}),
    ({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, {"a": ["torch.float32", "[2]", "[3]"]}),
    ({"a": 1}, {"b": 1}, {"a": [], "b": []}),
    ([1, 2], [1, 3], {"[1]": [2, 3]}),
    ([1], [1, 3], {"": [1, 2]}),
    ({"a": None}, {"a": 0.5}, {"a": [None, 0.5]}),
    (torch.zeros(()), torch.ones(()), {"": [1, 1, 1]}),
]


@pytest.mark.parametrize("one, other, found", DIFFERENCES)
def test_differences(one, other, found):
    texts = dict(text.split(": ", 1) for text in differences(one, other))
    assert texts.keys() == found.keys()
    assert [unnamed(texts[path], *parts) for path, parts in found.items()] == [[]] * len(found)


def test_a_difference_tells_which_has_what():
    mine, theirs = differences({"a": 1}, {"b": 1})
    assert mine.removeprefix("a: ") != theirs.removeprefix("b: ")
    assert {mine.replace("a: ", "b: ")} < set(differences({"b": 1}, {"a": 1}))
