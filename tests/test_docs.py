"""What the documentation shows works as it is shown, and every link leads somewhere."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
from commands import ROOT, only_run, problem_keys, status, train, unnamed

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FILE = re.compile(r"^`mine/(\S+)`:\n\n((?:(?: {4}.*)?\n)+)", re.M)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)")


def shown(page: str, folder: Path) -> Path:
    """`folder`, with the files of `mine/` that `page` shows in it."""
    for name, text in FILE.findall((ROOT / "docs" / page).read_text()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))
    return folder


def test_the_example_of_parts_of_ones_own(tmp_path):
    mine, outputs = shown("own.md", tmp_path / "mine"), tmp_path / "outputs"
    train(f"--config-dir={mine}", "experiment=first", "tracking=none", f"outputs={outputs}")
    assert status(only_run(outputs))["step"] == 200


def test_a_model_that_needs_a_spec_says_so(tmp_path):
    mine = shown("own.md", tmp_path / "mine")
    done = train(f"--config-dir={mine}", "data=points", "dry_run=true", code=1)
    assert problem_keys(done.stderr) == ["model._target_"]
    assert unnamed(done.stderr, "model._target_=atlas.models.vla.VLA", "Points") == []
    (page,) = re.findall(r"docs/[\w-]+\.md", done.stderr)
    assert (ROOT / page).exists()


def test_the_example_of_a_head_of_ones_own(tmp_path):
    mine, outputs = shown("robot-policy.md", tmp_path / "mine"), tmp_path / "outputs"
    short = ("trainer.steps=4", "schedule.warmup=1", "data.episodes=20", "data.rollouts=1")
    train(
        *(f"--config-dir={mine}", "model/action_head=square", "tracking=none"),
        *(f"outputs={outputs}", *short),
    )
    assert "val/l1" in status(only_run(outputs))["last"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for path, anchor in LINK.findall(page.read_text()):
        target = (page.parent / path) if path else page
        assert target.exists(), path
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]
            assert anchor in anchors, f"{path}#{anchor}"
