"""What a run directory may do to who uses it, and what it may show to who reads it."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import OWN, ROOT, environment, only_run, quick, train, unnamed

from atlas import load_policy
from atlas.errors import AtlasError
from atlas.run import trust
from atlas.run.directory import Run

STRANGER = 12345
HARMLESS = {
    "model": {"_target_": "atlas.models.vla.VLA", "vision": {"_target_": "torch.nn.Identity"}}
}
EVIL = [
    {"model": {"_target_": "os.system"}},
    {"model": {"_target_": "own_parts.Net"}},
    {"model": {"_target_": "atlas.models.vla.VLA", "parts": [{"_target_": "subprocess.Popen"}]}},
    {"model": {"_target_": "torch.load", "f": "x", "weights_only": False}},
    {"model": {"_target_": "torch.hub.load"}},
    {"model": {"_target_": "torch.utils.collect_env.run"}},
    {"model": {"_target_": "torch.os.system"}},
    {"model": {"_target_": "torch.nn.modules.module.torch.os.system"}},
    {"model": {"_target_": "torch.nn.modules.module.weakref.finalize"}},
    {"model": {"_target_": "torch.nn.modules.module.namedtuple"}},
    {"model": {"_target_": "atlas.run.code_version.subprocess.run"}},
    {"model": {"_target_": "atlas.worker.main"}},
    {"model": {"_target_": "torch.nn.${x}"}},
    {"model": {"_target_": None}},
    {"data": {"train": "${oc.decode:'{_target_: os.system}'}"}},
    {"schedule": {"_target_": "builtins.exec"}},
    {"cluster": {"_target_": "launchers.launch.start"}},
    {"cluster": {"_target_": "subprocess.run"}},
]


def strangers(folder: Path, config: dict) -> Path:
    """A configuration that belongs to another user."""
    if os.geteuid() != 0:
        pytest.skip("giving a file to another user takes root")
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({"run": {"sys_path": [str(OWN)]}, **config}))
    os.chown(file, STRANGER, STRANGER)
    return file


@pytest.mark.parametrize("config", EVIL, ids=str)
def test_what_a_stranger_may_not_name(tmp_path, config):
    file = strangers(tmp_path, config)
    with pytest.raises(AtlasError) as raised:
        trust.read_trusted_config(Run(tmp_path))
    assert unnamed(str(raised.value), file, STRANGER, "--trust") == []


def test_what_a_stranger_may_name(tmp_path):
    strangers(tmp_path, {**HARMLESS, "cluster": {"_target_": "launchers.local.LocalLauncher"}})
    assert trust.read_trusted_config(Run(tmp_path))["model"] == HARMLESS["model"]


@pytest.mark.parametrize("config", EVIL, ids=str)
def test_ones_own_may_name_anything(tmp_path, config):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert trust.read_trusted_config(Run(tmp_path)) == config


@pytest.mark.parametrize(
    "prefix, good", [("own_parts", True), ("own_parts.", True), ("own", False)]
)
def test_a_prefix_is_a_module(tmp_path, monkeypatch, prefix, good):
    strangers(tmp_path, {"model": {"_target_": "own_parts.Net"}})
    monkeypatch.syspath_prepend(str(OWN))
    monkeypatch.setenv(trust.VARIABLE, prefix)
    if good:
        trust.read_trusted_config(Run(tmp_path))
    else:
        with pytest.raises(AtlasError, match=r"own_parts\.Net"):
            trust.read_trusted_config(Run(tmp_path))


def test_a_strangers_modules_are_not_on_the_path(tmp_path, monkeypatch):
    file = strangers(tmp_path, HARMLESS)
    before = list(sys.path)
    trust.extend_sys_path(file, ["/nowhere"])
    assert sys.path == before
    monkeypatch.setattr(sys, "path", before)
    trust.extend_sys_path(file, ["/nowhere"], ["own_parts"])
    assert sys.path[-1] == "/nowhere"


@pytest.mark.parametrize(
    "before, added, after",
    [
        (None, [], None),
        (None, ["x"], "x"),
        (None, ["x.y", "z"], "x.y,z"),
        ("a,b", ["x"], "a,b,x"),
        ("a", [], "a"),
        ("a", [""], "a"),
    ],
)
def test_more_prefixes(monkeypatch, before, added, after):
    monkeypatch.setenv(trust.VARIABLE, before or "")
    if before is None:
        monkeypatch.delenv(trust.VARIABLE)
    trust.add_prefixes(added)
    assert os.environ.get(trust.VARIABLE) == after


def test_a_strangers_run_is_used_only_when_trusted(tmp_path, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("giving a file to another user takes root")
    arguments = quick(tmp_path, "trainer.steps=8", "model.pause=0.02", "trainer.max_time=0.002")
    train(*arguments, code=75)
    run = only_run(tmp_path)
    os.chown(run / "config.yaml", STRANGER, STRANGER)
    refused = train(f"resume={run}", code=1)
    assert "own_parts.Net" in refused.stderr and "--trust" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert (run / "config.yaml").stat().st_uid == STRANGER  # nothing was done to it
    worker = subprocess.run(
        [sys.executable, "-m", "atlas.worker", str(run)],
        **{"capture_output": True, "text": True, "env": environment(PYTHONPATH=str(ROOT))},
    )
    assert worker.returncode == 1 and "--trust" in worker.stderr
    with pytest.raises(AtlasError, match="own_parts"):
        load_policy(run)
    train(f"resume={run}", "trainer.max_time=null", "--trust", "own_parts")
    os.chown(run / "config.yaml", STRANGER, STRANGER)
    monkeypatch.syspath_prepend(str(OWN))
    assert load_policy(run, device="cpu", trust=["own_parts"]).step == 8


SECRET = "geheim"


def test_no_secret_is_written_anywhere(tmp_path):
    arguments = quick(
        tmp_path / "o",
        "tracking=mlflow",
        "tracking.wait_s=60",
        "trainer.steps=5",
        f"+hydra.job.env_set.MLFLOW_TRACKING_PASSWORD={SECRET}",
    )
    uri = f"http://me:{SECRET}@127.0.0.1:9"
    done = train(*arguments, MLFLOW_TRACKING_URI=uri, MY_TOKEN=SECRET)
    assert SECRET not in done.stdout + done.stderr
    assert f"atlas sync {only_run(tmp_path / 'o')}" in done.stdout  # the store took nothing
    files = [path for path in (tmp_path / "o").rglob("*") if path.is_file()]
    assert {"config.yaml", "status.json", "sync.log", "mlflow.json"} <= {p.name for p in files}
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("umask, mode", [(0o077, 0o600), (0o002, 0o664)], ids=["private", "group"])
def test_files_get_the_persons_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        train(*quick(tmp_path / "o", "trainer.steps=5"))
    finally:
        os.umask(before)
    odd = {
        str(path.relative_to(tmp_path)): oct(path.stat().st_mode)
        for path in (tmp_path / "o").rglob("*")
        if not path.is_symlink()
        and stat.S_IMODE(path.stat().st_mode)
        != (mode | (mode & 0o444) >> 2 if path.is_dir() else mode)
    }
    assert odd == {}


@pytest.mark.parametrize("word", ["pickle.load", "import pickle", "joblib", "allow_pickle=True"])
def test_nothing_is_unpickled(word):
    sources = [*ROOT.glob("atlas/**/*.py"), *ROOT.glob("launchers/**/*.py")]
    assert [path.name for path in sources if word in path.read_text()] == []
    for path in sources:
        for call in re.findall(r"torch\.load\(.*?\)\n", path.read_text(), re.DOTALL):
            assert "weights_only=True" in call, path
