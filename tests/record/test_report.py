"""The report: every journal that a run can leave gives a picture."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from atlas.record.figure import smooth
from atlas.record.report import draw, read_curves
from atlas.run.directory import Run
from atlas.run.provenance import Provenance

PNG = b"\x89PNG\r\n\x1a\n"


def make_run(outputs: Path, overrides: list[str] | None = None) -> Run:
    config = {
        "name": "demo",
        "outputs": str(outputs),
        "data": {"batch_size": 8},
        "trainer": {"steps": 100, "accumulate": 1},
        "tracking": {"kind": "none"},
    }
    run = Run.locate(config, 1)
    run.create(config, 1, Provenance.collect(overrides or []))
    return run


def line(step: int, **metrics: float) -> str:
    return json.dumps({"step": step, "time": 1.0 + step, **metrics}) + "\n"


JOURNALS = {
    "missing": None,
    "empty": "",
    "one": line(0, **{"train/loss": 1.0, "lr/all": 0.0}),
    "only validation": line(9, **{"val/loss": 0.5, "val/success": 0.0}),
    "not finite": "".join(
        line(n, **{"train/loss": value, "lr/a": value, "val/loss": value})
        for n, value in enumerate([1.0, math.nan, math.inf, -math.inf, 1e308, 1e-320])
    ),
    "nothing finite": line(0, **{"train/loss": math.nan, "val/l1": math.nan, "lr/x": math.inf}),
    "broken lines": "garbage\n[1]\n{}\n" + line(3, **{"train/loss": 2.0}) + '{"step": 4, "tra',
    "strange names": line(
        1, **{"lr/$a_[0]$": 1e-3, "lr/_b": 1e-9, "val/$x^": 1.0, "val/日本": 2.0}
    ),
    "many metrics": line(1, **{f"val/m{n}": 1.0 * n for n in range(40)}),
}


@pytest.mark.parametrize("text", JOURNALS.values(), ids=JOURNALS.keys())
def test_every_journal_gives_a_picture(tmp_path: Path, text: str | None) -> None:
    run = make_run(tmp_path, ["seed=1", "note='$5 & <b>'", "x=" + "y" * 900])
    if text is not None:
        run.journal_file.write_text(text)
    assert draw(run) == run.report_file
    assert run.report_file.read_bytes().startswith(PNG)
    assert not list(run.path.glob(".report.png.*"))


def test_long_journals_are_thinned_and_keep_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atlas.record.report.KEPT_LINES", 100)
    path = tmp_path / "metrics.jsonl"
    with open(path, "w") as file:
        for step in range(10_000):
            file.write(line(step, **{"train/loss": 1 / (step + 1)}))
            if step % 999 == 1:
                file.write(line(step, **{"val/loss": float(step)}))
    curves = read_curves(path)
    assert len(curves["train/loss"][0]) <= 100
    assert curves["val/loss"][0] == list(range(1, 10_000, 999))


@pytest.mark.parametrize("width", [0, 1, 2, 3, 8, 100])
@pytest.mark.parametrize("length", [0, 1, 2, 5, 40])
def test_smoothing_is_the_median_around_each_value(width: int, length: int) -> None:
    values = [(7 * n * n) % 23 + 0.5 for n in range(length)]
    half = width // 2
    around = [sorted(values[max(0, n - half) : n + half + 1]) for n in range(length)]
    assert smooth(values, width) == [window[len(window) // 2] for window in around]


def test_drawing_loads_neither_pyplot_nor_mlflow_nor_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    code = (
        "import sys; from atlas.record.report import draw; from atlas.run.directory import Run;"
        "assert 'matplotlib' not in sys.modules; draw(Run(sys.argv[1]));"
        "print([m for m in ('matplotlib.pyplot', 'mlflow', 'torch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
