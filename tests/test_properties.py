"""Whatever is typed: a plan, or one clear error. Never a traceback of Atlas's own, never a run."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import unnamed
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from atlas.config.checks import check
from atlas.config.dotted import flatten
from atlas.config.schema import KEYS, Settings
from atlas.run.directory import Run
from atlas.run.provenance import Provenance
from atlas.run.resume import adopt, require_source
from launchers.command_line import CommandLine
from launchers.dry_run import outline
from launchers.hydra_errors import explain, is_correctable
from launchers.launch import launcher_of, resolve

CONF = Path(__file__).resolve().parents[1] / "conf"
ODD = ["null", "true", "''", "[]", "{}", "[1,2]", "{a: 1}", "???", "nan", "inf", "-inf", "-1", "0"]
ODD += ["1e400", "1e-9", "0x10", "1_000", "${seed}", "${nope}", "${oc.env:HOME}", "${oc.env:NOPE}"]
ODD += [
    "${",
    "$",
    "'",
    '"',
    "\\",
    "a b",
    "a=b",
    "a,b",
    "choice(1,2)",
    "range(3)",
    "glob(*)",
    "é",
    "☃",
]
ODD += [
    "str(3)",
    "int(x)",
    "a:b",
    "[",
    "]",
    "{",
    "}",
    "(",
    ")",
    "@",
    "/",
    "..",
    "/tmp",
    ".",
    "~",
    "auto",
]
ODD += ["99999999999999999999", "1.5", "none", "linear", "bf16", "cpu", "adamw", "vla", "tabletop"]
GROUPS = (
    "optim",
    "schedule",
    "data",
    "model",
    "cluster",
    "tracking",
    "experiment",
    "hydra/launcher",
)
FORMS = (
    "{k}={v}",
    "{k}={v}",
    "{k}={v}",
    "+{k}={v}",
    "++{k}={v}",
    "~{k}",
    "~{k}={v}",
    "{k}",
    "={v}",
)


@pytest.fixture(scope="module", autouse=True)
def conf() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def keys() -> st.SearchStrategy[str]:
    known = [
        *KEYS,
        *KEYS,
        "trainer",
        "optim",
        "data.train.split",
        "cluster._target_",
        "schedule.floor",
    ]
    odd = st.text("abc._-/@:0é ", min_size=0, max_size=8)
    return st.one_of(
        st.sampled_from([*known, *GROUPS]), odd, st.sampled_from(known).map("{}.x".format)
    )


def values() -> st.SearchStrategy[str]:
    numbers = st.one_of(st.integers().map(str), st.floats().map(str))
    return st.one_of(st.sampled_from(ODD), numbers, st.text(max_size=12))


def override() -> st.SearchStrategy[str]:
    return st.builds(
        lambda form, k, v: form.format(k=k, v=v), st.sampled_from(FORMS), keys(), values()
    )


def plan(overrides: list[str]) -> str:
    """All that train.py does with `overrides` up to the plan: every step that needs no torch."""
    config = resolve(compose("config", overrides))
    provenance = Provenance.collect(overrides)
    if config.get("resume"):
        config, _ = adopt(config, provenance)
    check(config)
    require_source(config)
    launcher = launcher_of(config)
    launcher.check()
    run = Run.locate(config, launcher.world_size)
    return outline(run, Settings.of(config), launcher)


@functools.cache
def code_version() -> dict[str, Any]:
    return {"commit": None, "clean": None, "digest": "0"}


@pytest.fixture(scope="module", autouse=True)
def quick_commands(conf: None) -> Iterator[None]:
    """The state of the code is asked of git, a hundred times slower than all else here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atlas.run.provenance.code_version", lambda folder: code_version())
        patch.setattr("atlas.system.devices._count", lambda: 0)
        yield


def told(error: Exception, overrides: list[str]) -> str:
    """What train.py says; composes again, as it does."""
    try:
        return explain(error, CommandLine(overrides=tuple(overrides)))
    finally:
        GlobalHydra.instance().clear()
        initialize_config_dir(str(CONF), version_base="1.3")


def plans_or_tells(folder: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]) -> None:
    """Checks that `overrides` make a plan or one clear error, and leave nothing in `folder`."""
    monkeypatch.chdir(folder)
    try:
        assert re.search(r"\b[0-9a-f]{10}\b", plan(overrides))  # the id of the run
    except Exception as error:
        assert is_correctable(error), overrides
        text = told(error, overrides)
        assert text.strip() and "Traceback" not in text and "full_key" not in text
        assert not re.search(r"\b0x[0-9a-f]{8,}", text)
    assert list(folder.iterdir()) == []


SETTINGS = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
OVERRIDES = st.lists(override(), min_size=1, max_size=3)


@settings(SETTINGS, max_examples=40)
@given(OVERRIDES)
@example(["trainer=3"])
@example(["trainer=null"])
@example(["optim.lr_multipliers=[1,2]"])
@example(["name=null"])
@example(["name='a/../../b'"])
@example(["outputs=null"])
@example(["resume=3"])
@example(["resume='*'"])
@example(["resume=['a']"])
@example(["resume=/"])
@example(["init_from='[', 'seed=1'"])
@example(["cluster._target_=os.system"])
@example(["cluster=null"])
@example(["~cluster"])
@example(["~trainer.steps"])
@example(["~schedule"])
@example(["schedule=null"])
@example(["schedule._target_=null"])
@example(["data=null"])
@example(["data.train=null"])
@example(["+cluster.x=1"])
@example(["++cluster.nodes=99999999999999999999"])
@example(["trainer.steps=${trainer.steps}"])
@example(["optim.lr=${optim}"])
@example(["+trainer.steps.x=1"])
@example(["seed=${oc.env:NOPE_NOPE}"])
@example(["name=${nope:1}"])
def test_a_plan_or_one_clear_error(tmp_path, monkeypatch, overrides):
    plans_or_tells(tmp_path, monkeypatch, overrides)


@pytest.mark.slow
@settings(SETTINGS, max_examples=400)
@given(OVERRIDES)
def test_a_plan_or_one_clear_error_of_many(tmp_path, monkeypatch, overrides):
    plans_or_tells(tmp_path, monkeypatch, overrides)


def test_what_is_sound_has_a_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    accumulate = resolve(compose("config", []))["trainer"]["accumulate"]
    told = plan(["optim.lr=1e-3", "data.batch_size=3"])
    assert unnamed(told, 3, accumulate, 3 * accumulate) == []  # of the effective batch
    assert "seed" in flatten(resolve(compose("config", [])))
