"""What is wrong with a configuration is told before anything is done: key, value and remedy."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import problem_keys, unnamed
from hydra import compose, initialize_config_dir

from atlas.config.checks import check
from atlas.config.schema import KEYS
from atlas.config.single_file import overrides_of
from atlas.errors import ConfigError
from launchers.launch import resolve

ROOT = Path(__file__).resolve().parents[2]
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
        # the bounds themselves
        ["trainer.steps=1", "schedule.warmup=0", "schedule.floor=0", "trainer.val_interval=1"],
        ["trainer.ema=0.999999", "schedule.floor=1", "data.workers=0", "tracking.wait_s=0"],
        ["seed=0", "data.batch_size=1", "trainer.keep=1", "optim.lr_multipliers.fusion=0"],
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


# An override that is wrong; how the problem begins; and what else it names: the permitted bounds and
# values, the choices (the nearest of them twice: it is suggested and listed) and the remedy.
WRONG: list[tuple[str, str, list[str]]] = [
    # non-positive sizes
    ("trainer.steps=0", "trainer.steps=0", ["1"]),
    ("trainer.steps=-5", "trainer.steps=-5", ["1"]),
    ("trainer.accumulate=0", "trainer.accumulate=0", ["1"]),
    ("trainer.log_interval=0", "trainer.log_interval=0", ["1"]),
    ("trainer.val_interval=0", "trainer.val_interval=0", ["1", "auto", "null"]),
    ("trainer.val_batches=0", "trainer.val_batches=0", ["1", "null"]),
    ("trainer.save_interval=0", "trainer.save_interval=0", ["1", "null"]),
    ("trainer.save_minutes=0", "trainer.save_minutes=0", ["0", "null"]),
    ("trainer.max_time=-1", "trainer.max_time=-1", ["0", "null"]),
    ("trainer.keep=0", "trainer.keep=0", ["1"]),
    ("trainer.patience=0", "trainer.patience=0", ["1", "null"]),
    ("trainer.clip_norm=0", "trainer.clip_norm=0", ["0", "null"]),
    ("trainer.ema=1", "trainer.ema=1", ["0", "0.999999", "null"]),
    ("optim.lr=0", "optim.lr=0", ["0"]),
    ("optim.lr=inf", "optim.lr=inf", ["0"]),
    ("optim.lr=nan", "optim.lr=nan", ["0"]),
    ("optim.base_batch_size=0", "optim.base_batch_size=0", ["1"]),
    ("data.batch_size=0", "data.batch_size=0", ["1"]),
    ("data.workers=-1", "data.workers=-1", ["0"]),
    ("cluster.nodes=0", "cluster.nodes=0", ["1"]),
    ("cluster.nproc_per_node=0", "cluster.nproc_per_node=0", ["1", "auto"]),
    ("seed=-1", "seed=-1", ["0"]),
    ("schedule.warmup=-1", "schedule.warmup=-1", ["0"]),
    ("schedule.floor=2", "schedule.floor=2", ["0", "1"]),
    # of another type
    ("trainer.steps=many", "trainer.steps='many'", ["1"]),
    ("trainer.steps=10.5", "trainer.steps=10.5", ["1"]),
    ("trainer.steps=true", "trainer.steps=True", ["1"]),
    ("trainer.steps=null", "trainer.steps=None", ["1", "null"]),
    ("trainer.steps=[1,2]", "trainer.steps=[1, 2]", ["1"]),
    ("optim.lr=fast", "optim.lr='fast'", ["0"]),
    ("optim.lr='1e-4'", "optim.lr='1e-4'", ["0"]),
    ("trainer.compile=1", "trainer.compile=1", ["true", "false"]),
    ("trainer.progress=yes please", "trainer.progress='yes please'", ["true", "false", "auto"]),
    ("fresh=maybe", "fresh='maybe'", ["true", "false"]),
    ("schedule.warmup=long", "schedule.warmup='long'", ["0"]),
    ("optim.lr_multipliers.fusion=x", "optim.lr_multipliers.fusion='x'", ["0"]),
    ("optim.lr_multipliers.fusion=-1", "optim.lr_multipliers.fusion=-1", ["0"]),
    (
        "++optim.lr_multipliers.fusion.mix=0",
        "optim.lr_multipliers.fusion={'mix': 0}",
        ["'++optim.lr_multipliers={fusion.mix:0}'"],
    ),
    ("data.train=points", "data.train='points'", []),
    # choices, with the nearest
    ("trainer.precision=bf61", "trainer.precision='bf61'", ["bf16", "bf16", "fp32", "tf32"]),
    ("optim.scale_lr=sqr", "optim.scale_lr='sqr'", ["sqrt", "sqrt", "linear", "none"]),
    ("cluster.device=gpu", "cluster.device='gpu'", ["auto", "cpu", "cuda"]),
    ("tracking.kind=wandb", "tracking.kind='wandb'", ["mlflow", "none"]),
    ("tracking.wait_s=long", "tracking.wait_s='long'", ["0"]),
    ("tracking.wait_s=-1", "tracking.wait_s=-1", ["0"]),
    ("tracking.log_best=maybe", "tracking.log_best='maybe'", ["true", "false"]),
    # unknown keys where all are Atlas's own
    ("+trainer.stpes=3", "trainer.stpes", ["steps", "steps", "keep"]),
    ("+optim.learning_rate=3", "optim.learning_rate", ["lr", "scale_lr"]),
    ("+sede=3", "sede", ["seed", "seed", "name"]),
    # relations
    ("trainer.steps=1000", "schedule.warmup=1000", ["trainer.steps=1000"]),
    ("trainer.steps=300", "schedule.warmup=1000", ["trainer.steps=300"]),
    # places
    ("outputs=/etc/hostname/o", "outputs=/etc/hostname/o", ["/etc/hostname"]),
    # secrets: the variable of the environment that can hold it; the value is not repeated
    ("+data.token=hf_abc", "data.token", ["TOKEN"]),
    ("+tracking.password=pa55", "tracking.password", ["PASSWORD"]),
    ("+model.own={API_KEY: s3cr3t}", "model.own.API_KEY", ["API_KEY"]),
    ("+data.hf_token=hf_abc", "data.hf_token", ["HF_TOKEN"]),
    ("tracking.uri=http://me:pa55@host", "tracking.uri", ["MLFLOW_TRACKING_PASSWORD"]),
    *((f"tracking.uri={uri}", f"tracking.uri={uri}", ["sqlite:///FILE"]) for uri in NO_STORES),
    # a name is a folder's
    ("name=../elsewhere", "name='../elsewhere'", ["outputs"]),
    ("name=''", "name=''", ["outputs"]),
]


def split(problem: str, start: str) -> str:
    """What a problem says after `start`: a key, and its value unless that is a secret."""
    assert re.match(rf"{re.escape(start)}[\s:;,]", problem), problem
    return problem[len(start) :]


@pytest.mark.parametrize(("override", "start", "parts"), WRONG, ids=[case[0] for case in WRONG])
def test_one_thing_wrong(override, start, parts):
    (problem,) = problems(override)
    assert unnamed(split(problem, start), *parts) == []
    assert not any(secret in problem for secret in ("hf_abc", "pa55", "s3cr3t"))


@pytest.mark.parametrize(
    ("overrides", "start", "parts"),
    [
        (["resume=abc", "fresh=true"], "resume", ["fresh=true"]),
        (
            ["trainer.patience=3", "data.val=null"],
            "trainer.patience=3",
            ["data.val", "trainer.patience=null"],
        ),
        (["outputs='/tmp/a%20b'"], "outputs=/tmp/a%20b", ["tracking.uri", "tracking=none"]),
        (["data=lerobot", "data.root=/none"], "data.root=/none", ["data.revision"]),
    ],
)
def test_one_contradiction(monkeypatch, overrides, start, parts):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (problem,) = problems(*overrides)
    assert unnamed(split(problem, start), *parts) == []


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
    assert problem_keys(f"error: {ConfigError(found)}") == sorted(
        (
            "trainer.keep",
            "data.batch_size",
            "optim.lr",
            "trainer.precision",
            "data.token",
            "trainer.own",
            "schedule.warmup",  # of values that are right themselves
            "outputs",
            "data.root",
        )
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    (problem,) = problems(f"outputs={tmp_path}/below")
    assert unnamed(split(problem, f"outputs={tmp_path}/below"), tmp_path) == []


# What is typed, the keys that are told of, and what is named with them.
TYPED: dict[str, tuple[list[str], list[str], list[str]]] = {
    "key": (
        ["trainer.stpes=3", "optim.lr=-1", "data.batch_size=0"],
        ["data.batch_size", "optim.lr", "trainer.stpes"],
        ["data.batch_size=0", "optim.lr=-1", "steps", "steps"],
    ),
    "option": (["optim=adamv"], ["optim"], ["optim=adamv", "adamw", "adamw", "sgd"]),
    "values": (
        ["trainer.steps=many", "seed=-1", "trainer.precision=fp61", "+tracking.token=abc"],
        ["seed", "tracking.token", "trainer.precision", "trainer.steps"],
        ["trainer.steps='many'", "seed=-1", "trainer.precision='fp61'"],
    ),
    "warmup": (
        ["trainer.steps=300"],
        ["schedule.warmup"],
        ["schedule.warmup=1000", "trainer.steps=300"],
    ),
    "modules": (
        ["optim.lr_multipliers.lang_encodr=1", "optim.lr_multipliers.fusion.layers=0"],
        ["optim.lr_multipliers.fusion.layers", "optim.lr_multipliers.lang_encodr"],
        ["lang_encoder", "lang_encoder", "'++optim.lr_multipliers={fusion.layers:…}'"],
    ),
    "missing": (["data=lerobot", "seed=-1"], ["data.root", "seed"], ["data.root=", "seed=-1"]),
    "own folder": (
        ["--config-dir", str(ROOT / "tests" / "own"), "model=net", "trainer.stpes=3"],
        ["trainer.stpes"],
        ["steps", "steps"],
    ),
}


@pytest.mark.parametrize("case", TYPED)
def test_command_line(tmp_path, case):
    arguments, keys, parts = TYPED[case]
    told = told_of(tmp_path, *arguments)
    assert problem_keys(told) == keys
    assert unnamed(told, *parts) == []
    assert not [word for word in ("token=abc", "=net") if word in told]  # no secret, nothing right


@pytest.mark.parametrize("reference", ["nope", "1234567890", "12345e6789"])
@pytest.mark.parametrize("key", ["resume", "init_from"])
def test_no_run_of_that_name(tmp_path, key, reference):
    told = told_of(tmp_path, f"{key}={reference}")
    assert unnamed(told, reference, tmp_path / "o") == []
    assert key == "resume" or problem_keys(told) == [key]


def told_of(folder: Path, *arguments: str) -> str:
    """The error that `arguments` end with, before anything is printed or written."""
    done = train(f"outputs={folder}/o", *arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert "Traceback" not in done.stderr and "full_key" not in done.stderr
    assert list(folder.iterdir()) == []
    return done.stderr


@pytest.mark.parametrize(
    ("outputs", "name", "number"),
    [
        ("new", "x" * 300, errno.ENAMETOOLONG),
        ("x" * 300, "a", errno.ENAMETOOLONG),
        (".", "file", errno.ENOTDIR),
        ("gone", "a", errno.EEXIST),
    ],
    ids=["name too long", "outputs too long", "a file in the way", "a link to nowhere"],
)
def test_where_no_run_can_be_written(tmp_path, outputs, name, number):
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to("nowhere")
    done = train(f"outputs={tmp_path / outputs}", f"name={name}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert unnamed(done.stderr, os.strerror(number), tmp_path, "outputs") == []


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
    assert re.search(r"steps: \d+ +# \w", found["trainer.steps"]) and "hydra.run.dir" in found
    assert re.search(
        r"betas: .*\] +# \w", dict(leaves(CONF / "optim/adamw.yaml"))["optimizer.betas"]
    )


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
    known = {key.removeprefix("schedule.") for key in KEYS if key.startswith("schedule.")}
    assert set(yaml.safe_load(path.read_text())) <= known


def test_one_file_takes_paths_with_dots(tmp_path):
    file = tmp_path / "one.yaml"
    file.write_text("training: {lr_multipliers: {fusion: 0.5, lang_encoder.embed: 0}}")
    config: dict[str, Any] = resolve(compose("config", overrides_of(str(file))))
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
