"""What is wrong with a configuration is told before anything is done: key, value and remedy."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from atlas.config import KEYS, SCHEDULE, check
from atlas.errors import ConfigError
from atlas.onefile import translated
from launchers.launch import resolve

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
FILES = sorted(CONF.glob("**/*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def conf() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def problems(*overrides: str) -> list[str]:
    """What `check` finds wrong with a command line."""
    try:
        check(resolve(compose("config", list(overrides))))
    except ConfigError as error:
        return error.problems
    return []


def train(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )


NO_STORES = ("ftp://host", "http://", "file:///tmp/mlruns", "/tmp/mlruns", "mlruns")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optim.lr=2.8e-4", "schedule.warmup=1000"],
        ["optim=sgd", "schedule=linear", "tracking=none"],
        ["schedule=constant", "schedule.warmup=0"],
        ["trainer.steps=1001"],
        ["optim.lr=1", "trainer.clip_norm=null", "trainer.val_interval=null"],
        ["trainer.val_interval=auto", "trainer.val_interval=7", "cluster.nproc_per_node=8"],
        ["trainer.ema=0.999", "trainer.max_time=0.5", "trainer.save_minutes=0.1"],
        ["optim.lr_multipliers.fusion=0", "optim.lr_multipliers.vision=0.5"],
        ["data.val=null"],
        ["+data.own=3", "+model.own={a: 1}"],
        ["data=lerobot", f"data.root={ROOT}"],
        ["+data.token=null", "+data.password=''"],
        ["+data.tokenizer=words", "+model.max_tokens=12"],
    ],
    ids=" ".join,
)
def test_nothing_is_wrong(overrides):
    assert problems(*overrides) == []


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        # non-positive sizes
        ("trainer.steps=0", ["trainer.steps=0", "whole number of at least 1"]),
        ("trainer.steps=-5", ["trainer.steps=-5", "at least 1"]),
        ("trainer.accumulate=0", ["trainer.accumulate=0", "at least 1"]),
        ("trainer.log_interval=0", ["trainer.log_interval=0", "at least 1"]),
        ("trainer.val_interval=0", ["trainer.val_interval=0", "at least 1, or auto, or null"]),
        ("trainer.val_batches=0", ["trainer.val_batches=0", "at least 1, or null"]),
        ("trainer.save_interval=0", ["trainer.save_interval=0", "or null"]),
        ("trainer.save_minutes=0", ["trainer.save_minutes=0", "above 0, or null"]),
        ("trainer.max_time=-1", ["trainer.max_time=-1", "above 0, or null"]),
        ("trainer.keep=0", ["trainer.keep=0", "at least 1"]),
        ("trainer.patience=0", ["trainer.patience=0", "at least 1, or null"]),
        ("trainer.clip_norm=0", ["trainer.clip_norm=0", "above 0, or null"]),
        ("trainer.ema=1", ["trainer.ema=1", "above 0 and at most 0.999999, or null"]),
        ("optim.lr=0", ["optim.lr=0", "above 0"]),
        ("optim.lr=inf", ["optim.lr=inf", "a number above 0"]),
        ("optim.lr=nan", ["optim.lr=nan", "a number above 0"]),
        ("optim.base_batch_size=0", ["optim.base_batch_size=0", "at least 1"]),
        ("data.batch_size=0", ["data.batch_size=0", "at least 1"]),
        ("data.workers=-1", ["data.workers=-1", "at least 0"]),
        ("cluster.nodes=0", ["cluster.nodes=0", "at least 1"]),
        ("cluster.nproc_per_node=0", ["cluster.nproc_per_node=0", "at least 1, or auto"]),
        ("seed=-1", ["seed=-1", "at least 0"]),
        ("schedule.warmup=-1", ["schedule.warmup=-1", "at least 0"]),
        ("schedule.floor=2", ["schedule.floor=2", "at least 0 and at most 1"]),
        # of another type
        ("trainer.steps=many", ["trainer.steps='many'", "whole number"]),
        ("trainer.steps=10.5", ["trainer.steps=10.5", "whole number"]),
        ("trainer.steps=true", ["trainer.steps=True", "whole number"]),
        ("trainer.steps=null", ["trainer.steps=None", "whole number", "not null"]),
        ("trainer.steps=[1,2]", ["trainer.steps=[1, 2]", "whole number"]),
        ("optim.lr=fast", ["optim.lr='fast'", "a number above 0"]),
        ("optim.lr='1e-4'", ["optim.lr='1e-4'", "a number above 0"]),
        ("trainer.compile=1", ["trainer.compile=1", "true or false"]),
        (
            "trainer.progress=yes please",
            ["trainer.progress='yes please'", "true or false, or auto"],
        ),
        ("fresh=maybe", ["fresh='maybe'", "true or false"]),
        ("schedule.warmup=long", ["schedule.warmup='long'", "whole number"]),
        ("optim.lr_multipliers.fusion=x", ["optim.lr_multipliers.fusion='x'", "at least 0"]),
        ("optim.lr_multipliers.fusion=-1", ["optim.lr_multipliers.fusion=-1", "at least 0"]),
        (
            "++optim.lr_multipliers.fusion.mix=0",
            ["in braces: '++optim.lr_multipliers={fusion.mix:0}'"],
        ),
        ("data.train=points", ["data.train='points'", "a mapping"]),
        # choices, with the nearest
        (
            "trainer.precision=bf61",
            ["trainer.precision='bf61'", "did you mean 'bf16'", "fp32, tf32"],
        ),
        ("optim.scale_lr=sqr", ["optim.scale_lr='sqr'", "did you mean 'sqrt'", "linear, none"]),
        ("cluster.device=gpu", ["cluster.device='gpu'", "auto, cpu, cuda"]),
        ("tracking.kind=wandb", ["tracking.kind='wandb'", "mlflow, none"]),
        ("tracking.wait_s=long", ["tracking.wait_s='long'", "a number"]),
        ("tracking.wait_s=-1", ["tracking.wait_s=-1", "at least 0"]),
        ("tracking.log_best=maybe", ["tracking.log_best='maybe'", "true or false"]),
        # unknown keys where all are Atlas's own
        ("+trainer.stpes=3", ["trainer.stpes", "did you mean 'steps'"]),
        ("+optim.learning_rate=3", ["optim.learning_rate is not a key of Atlas", "There are:"]),
        ("+sede=3", ["sede is not a key of Atlas", "did you mean 'seed'"]),
        # relations
        ("trainer.steps=1000", ["schedule.warmup=1000", "below trainer.steps=1000", "shorten"]),
        ("trainer.steps=300", ["schedule.warmup=1000 must be below trainer.steps=300"]),
        # places
        ("outputs=/etc/hostname/o", ["outputs=/etc/hostname/o", "/etc/hostname is not a folder"]),
        # secrets
        ("+data.token=hf_abc", ["data.token", "environment", "TOKEN"]),
        ("+tracking.password=pa55", ["tracking.password", "environment", "PASSWORD"]),
        ("+model.own={API_KEY: s3cr3t}", ["model.own.API_KEY", "environment"]),
        ("+data.hf_token=hf_abc", ["data.hf_token", "environment"]),
        ("tracking.uri=http://me:pa55@host", ["tracking.uri", "environment"]),
        *(
            (f"tracking.uri={uri}", ["no address of a store", "sqlite:///FILE"])
            for uri in NO_STORES
        ),
        # a name is a folder's
        ("name=../elsewhere", ["name='../elsewhere'", "folder"]),
        ("name=''", ["name=''"]),
    ],
)
def test_one_thing_wrong(override, parts):
    (problem,) = problems(override)
    assert [part for part in parts if part not in problem] == []
    assert not any(secret in problem for secret in ("hf_abc", "pa55", "s3cr3t"))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["resume=abc", "fresh=true"], ["resume and fresh=true", "one of them"]),
        (["trainer.patience=3", "data.val=null"], ["trainer.patience=3", "no data.val", "null"]),
        (["outputs='/tmp/a%20b'"], ["outputs=/tmp/a%20b: MLflow", "tracking.uri", "tracking=none"]),
        (["data=lerobot", "data.root=/none"], ["data.root=/none does not exist", "folder"]),
    ],
)
def test_one_contradiction(monkeypatch, overrides, parts):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (problem,) = problems(*overrides)
    assert [part for part in parts if part not in problem] == []


def test_everything_wrong_is_told_at_once(tmp_path):
    file = tmp_path / "file"
    file.touch()
    found = problems(
        "trainer.keep=0",
        "data.batch_size=-1",
        "optim.lr=fast",
        "trainer.precision=fp8",
        "+data.token=abc",
        "+trainer.own=1",
        "trainer.steps=300",
        f"outputs={file}/below",
        "data=lerobot",
        "data.root=/none",
    )
    for key in (
        "trainer.keep",
        "data.batch_size",
        "optim.lr",
        "trainer.precision",
        "data.token",
        "trainer.own",
        "schedule.warmup",  # of values that are right themselves
        "outputs",
        "data.root",
    ):
        assert sum(text.startswith(key) for text in found) == 1, key
    assert len(found) == 9


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    (problem,) = problems(f"outputs={tmp_path}/below")
    assert str(tmp_path) in problem and "written" in problem


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["trainer.stpes=3", "optim.lr=-1", "data.batch_size=0"],
            [
                "trainer.stpes",
                "did you mean 'steps'",
                "optim.lr=-1",
                "data.batch_size=0",
                "3 problems",
            ],
        ),
        (["optim=adamv"], ["optim=adamv", "did you mean 'adamw'", "sgd"]),
        (
            ["trainer.steps=many", "seed=-1", "trainer.precision=fp61", "+tracking.token=abc"],
            ["trainer.steps='many'", "seed=-1", "'fp61'", "tracking.token", "4 problems"],
        ),
        (["trainer.steps=300"], ["schedule.warmup=1000 must be below trainer.steps=300"]),
        (
            ["optim.lr_multipliers.lang_encodr=1", "optim.lr_multipliers.fusion.layers=0"],
            ["did you mean 'lang_encoder'", "'++optim.lr_multipliers={fusion.layers:…}'"],
        ),
        (["data=lerobot", "seed=-1"], ["data.root", "not set", "data.root=…", "seed=-1"]),
        (["resume=nope"], ["'nope' names no run"]),
        (["resume=1234567890"], ["'1234567890' names no run"]),
        (["init_from=nope"], ["init_from=nope", "no run"]),
        (["init_from=12345e6789"], ["init_from=12345e6789: '12345e6789' names no run"]),
        (
            ["--config-dir", str(ROOT / "tests" / "own"), "model=net", "trainer.stpes=3"],
            ["trainer.stpes", "did you mean 'steps'"],
        ),
    ],
    ids=[
        *("key", "option", "values", "warmup", "modules", "missing", "resume", "resume digits"),
        *("init_from", "init_from digits", "own folder"),
    ],
)
def test_command_line(tmp_path, arguments, parts):
    done = train(f"outputs={tmp_path}/o", *arguments)
    assert [part for part in parts if part not in done.stderr] == []
    assert done.returncode == 1 and done.stdout == ""
    assert "Traceback" not in done.stderr and "full_key" not in done.stderr
    assert not [
        word for word in ("token=abc", "=net") if word in done.stderr
    ]  # no secret, nothing right
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("outputs", "name", "words"),
    [
        ("new", "x" * 300, "File name too long"),
        ("x" * 300, "a", "File name too long"),
        (".", "file", "Not a directory"),
        ("gone", "a", "File exists"),
    ],
    ids=["name too long", "outputs too long", "a file in the way", "a link to nowhere"],
)
def test_where_no_run_can_be_written(tmp_path, outputs, name, words):
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to("nowhere")
    done = train(f"outputs={tmp_path / outputs}", f"name={name}")
    assert done.returncode == 1 and words in done.stderr and str(tmp_path) in done.stderr
    assert "Traceback" not in done.stderr and "outputs/name" in done.stderr


def leaves(path: Path) -> Iterator[tuple[str, str]]:
    """(key, line) of every leaf in a YAML file: of every scalar and every list."""

    def visit(node: yaml.Node, prefix: str) -> Iterator[tuple[str, int]]:
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if isinstance(value, yaml.MappingNode) and value.value:
                yield from visit(value, f"{name}.")
            else:
                yield name, key.start_mark.line

    text = path.read_text()
    lines = text.splitlines()
    root = yaml.compose(text)
    if root is not None:
        for name, number in visit(root, ""):
            yield name, lines[number]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_every_leaf_has_a_comment(path):
    silent = [
        name
        for name, line in leaves(path)
        if not re.search(r"\s#\s*\S", line)
        and name.partition(".")[0] not in ("defaults", "hydra")  # Hydra's own
        and not re.search(r":\s*\$\{[\w.]+\}\s*$", line)  # handed on from a key that has one
    ]
    assert silent == []


def test_the_scan_for_comments_sees_leaves():
    found = dict(leaves(CONF / "config.yaml"))
    assert "# optimizer updates in all" in found["trainer.steps"] and "hydra.run.dir" in found
    assert "# decay rates" in dict(leaves(CONF / "optim/adamw.yaml"))["optimizer.betas"]


def test_the_trainer_section_is_the_table():
    config = yaml.safe_load((CONF / "config.yaml").read_text())
    known = {key.removeprefix("trainer.") for key in KEYS if key.startswith("trainer.")}
    assert set(config["trainer"]) == known
    top = {key for key in KEYS if "." not in key}
    assert set(config) - {"defaults", "trainer", "hydra"} == top


@pytest.mark.parametrize("path", sorted((CONF / "optim").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_optim_section_is_the_table(path):
    known = {key.removeprefix("optim.") for key in KEYS if key.startswith("optim.")}
    assert set(yaml.safe_load(path.read_text())) == known


@pytest.mark.parametrize("path", sorted((CONF / "schedule").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_schedule_has_known_keys(path):
    assert set(yaml.safe_load(path.read_text())) <= {"_target_", *SCHEDULE}


def test_one_file_takes_paths_with_dots(tmp_path):
    file = tmp_path / "one.yaml"
    file.write_text("training: {lr_multipliers: {fusion: 0.5, lang_encoder.embed: 0}}")
    config: dict[str, Any] = resolve(compose("config", translated(["--config", str(file)])))
    assert config["optim"]["lr_multipliers"] == {
        **{"vision": 0, "lang_encoder": 0.1, "action_head": 1},
        **{"fusion": 0.5, "lang_encoder.embed": 0},
    }


def test_defaults_are_what_the_seed_recommends():
    config: dict[str, Any] = resolve(compose("config"))
    assert config["schedule"]["warmup"] == 1000 and config["schedule"]["_target_"].endswith(
        "Cosine"
    )
    assert config["data"]["batch_size"] == 8 and config["trainer"]["accumulate"] in (2, 3, 4)
    assert config["trainer"]["val_interval"] == "auto"
    assert 1e-4 <= config["optim"]["lr"] <= 1e-3
    assert config["optim"]["lr_multipliers"] == {
        "vision": 0,
        "lang_encoder": 0.1,
        "fusion": 1,
        "action_head": 1,
    }
