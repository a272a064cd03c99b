"""One parser for the command line: what belongs to Atlas, and what Hydra gets."""

from __future__ import annotations

import pytest

from launchers.command_line import CommandLine, parse

FILE = "training: {learning_rate: 2e-4, warmup_steps: 5}"
OF_FILE = ["optim.lr=2e-4", "schedule.warmup=5"]


# Typed, what Hydra gets of it, and the fields in which it differs from an empty command line.
TABLE = {
    "nothing": ([], [], {}),
    "overrides keep their order": (["b=1", "a=2", "~c"], ["b=1", "a=2", "~c"], {}),
    "options go first": (
        ["a=1,2", "--multirun", "b=1"],
        ["--multirun", "a=1,2", "b=1"],
        {"is_sweep": True},
    ),
    "-m between overrides": (["a=1", "-m", "b=1,2"], ["-m", "a=1", "b=1,2"], {"is_sweep": True}),
    "an option takes its value along": (
        ["a=1", "--config-dir", "mine", "b=1"],
        ["--config-dir", "mine", "a=1", "b=1"],
        {"config_dir": "mine"},
    ),
    "its short form": (["-cd", "mine", "a=1"], ["-cd", "mine", "a=1"], {"config_dir": "mine"}),
    "an equals sign": (["a=1", "-cd=mine"], ["-cd=mine", "a=1"], {"config_dir": "mine"}),
    "a folder with one": (["-cd", "a=b"], ["-cd", "a=b"], {"config_dir": "a=b"}),
    "the last one counts": (
        ["-cd", "a", "--config-dir=b"],
        ["-cd", "a", "--config-dir=b"],
        {"config_dir": "b"},
    ),
    "a value that is left out": (
        ["a=1", "--config-dir"],
        ["--config-dir", "a=1"],
        {"config_dir": ""},
    ),
    "all of Hydra's options with a value": (
        ["-cn", "x", "-cp", "y", "-p", "z", "-c", "job", "-i", "all", "a=1"],
        ["-cn", "x", "-cp", "y", "-p", "z", "-c", "job", "-i", "all", "a=1"],
        {},
    ),
    "an option without a value": (["a=1", "--resolve", "b=1"], ["--resolve", "a=1", "b=1"], {}),
    "an option that nobody knows": (["a=1", "--frobnicate"], ["--frobnicate", "a=1"], {}),
    "trust": (["--trust", "x", "a=1"], ["a=1"], {"trusted": ("x",)}),
    "trust twice": (
        ["a=1", "--trust=x.y", "b=1", "--trust", "z"],
        ["a=1", "b=1"],
        {"trusted": ("x.y", "z")},
    ),
    "trust without a prefix": (["a=1", "--trust"], ["a=1"], {"trusted": ("",)}),
    "torch.distributed.launch": (["--local-rank=3", "a=1"], ["a=1"], {}),
    "its older forms": (["--local_rank", "3", "a=1", "--local-rank", "3"], ["a=1"], {}),
    "an id of digits": (["resume=1234567890"], ["resume='1234567890'"], {}),
    "an id that looks like a float": (["init_from=12345e6789"], ["init_from='12345e6789'"], {}),
    "several ids": (["init_from=123,45e6,ab"], ["init_from='123','45e6',ab"], {}),
    "other numbers stay numbers": (["seed=12", "x.resume=1"], ["seed=12", "x.resume=1"], {}),
    "a path is no id": (["resume=outputs/a/12"], ["resume=outputs/a/12"], {}),
    "--config is not train.py's": (["--config", "x"], ["--config", "x"], {}),
}


@pytest.mark.parametrize("case", TABLE)
def test_typed(case):
    typed, for_hydra, changed = TABLE[case]
    line = parse(typed)
    assert line.arguments() == for_hydra
    for field in ("is_sweep", "config_dir", "trusted", "config_file"):
        assert getattr(line, field) == changed.get(field, getattr(CommandLine(), field)), field
    assert parse(for_hydra).arguments() == for_hydra


@pytest.mark.parametrize(
    ("typed", "for_hydra"),
    [
        (["--config", "FILE"], OF_FILE),
        (["--config=FILE", "optim.lr=1"], [*OF_FILE, "optim.lr=1"]),
        (["optim.lr=1", "--config", "FILE"], [*OF_FILE, "optim.lr=1"]),
        (["--config", "none.yaml", "--config", "FILE"], OF_FILE),
        (["-cd", "mine", "--config", "FILE", "a=1"], ["-cd", "mine", *OF_FILE, "a=1"]),
        (["a=1", "-m"], ["-m", "a=1"]),
    ],
)
def test_values_of_a_file_precede_what_was_typed(tmp_path, typed, for_hydra):
    file = tmp_path / "one.yaml"
    file.write_text(FILE)
    line = parse([text.replace("FILE", str(file)) for text in typed], takes_file=True)
    assert line.arguments() == for_hydra


def test_a_file_is_read_only_for_hydra():
    """Under torchrun rank 0 alone composes, and the file can be on its node alone."""
    line = parse(["--config", "none.yaml", "a=1"], takes_file=True)
    assert line.config_file == "none.yaml" and line.overrides == ("a=1",)


@pytest.mark.parametrize(
    ("typed", "sets"),
    [(["cluster=slurm"], True), (["cluster.nodes=2"], False), (["-cn", "cluster=x"], False)],
)
def test_whether_a_key_is_set(typed, sets):
    assert parse(typed).sets("cluster") is sets
