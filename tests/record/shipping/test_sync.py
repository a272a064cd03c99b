"""Tracking: whatever happens to the store or to us, MLflow ends with every point, once."""

from __future__ import annotations

import contextlib
import errno
import http.client
import http.server
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import quick, train, unnamed

import atlas.record.shipping.shipment as shipping
from atlas.cli import main
from atlas.config.schema import TrackingSettings
from atlas.errors import AtlasError
from atlas.record.journal import Journal
from atlas.record.shipping.cursor import Cursor, Shipped
from atlas.record.shipping.mlflow_store import MlflowClient, create_sqlite
from atlas.record.shipping.shipper import ProcessShipper, ReportShipper, open_shipper
from atlas.record.shipping.sync import sync as sync_all
from atlas.record.shipping.tags import valid_key
from atlas.record.shipping.writer import Parent, SyncLock
from atlas.run.directory import Run
from atlas.run.provenance import Provenance
from atlas.version import ROOT

FOLLOWED = """
import sys, time
from atlas.record.journal import Journal
from atlas.run.directory import Run
from atlas.record.shipping.shipper import ProcessShipper
run = Run(sys.argv[1])
lock = run.lock
lock.acquire()
run.update_status(state="running")
ProcessShipper([run]).start()
print("started", flush=True)
journal = Journal(run.journal_file)
journal.append(0, {"train/loss": 2.0})
journal.flush()
while not run.mlflow_file.exists():
    time.sleep(0.05)
for step in range(1, 2000):
    journal.append(step, {"train/loss": 1 / (step + 1)})
journal.flush()
print("written", flush=True)
time.sleep(100)
"""
# Sends a run and prints how many points that were.
SENT = """
import sys
from atlas.run.directory import Run
from atlas.record.shipping.sync import sync
[shipped] = sync([Run(sys.argv[1])])
print(shipped.sent)
"""


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    create_sqlite(path)
    return path


@pytest.fixture
def outputs(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An outputs directory with MLflow's tables made: they take seconds."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = tmp_path / "out puts"
    path.mkdir()
    shutil.copy(empty_store, path / "mlflow.db")
    return path


def make_run(outputs: Path, seed: int = 1, overrides: list[str] | None = None, **track: Any) -> Run:
    config = {
        "name": "demo",
        "outputs": str(outputs),
        "seed": seed,
        "optim": {"lr": 1e-3, "lr_multipliers": {"vision": 0, "lang_encoder": 0.1}},
        "data": {"batch_size": 8, "workers": 2},
        "trainer": {"steps": 600, "accumulate": 4, "keep": 3},
        "cluster": {"nodes": 1},
        "tracking": {**yaml.safe_load((ROOT / "conf/tracking/mlflow.yaml").read_text()), **track},
    }
    run = Run.locate(config, 1)
    run.create(config, 1, Provenance.collect(overrides or [f"seed={seed}", "data.workers=2"]))
    return run


def write(run: Run, steps: range) -> None:
    journal = Journal(run.journal_file)
    for step in steps:
        journal.append(step, {"train/loss": 1 / (step + 1), "lr/fusion": 1e-4 * step})
        if step % 10 == 9:
            journal.append(step, {"val/loss": 2 / (step + 1)})
    journal.close()


def in_journal(run: Run) -> Counter[tuple[str, int, int, float]]:
    found: Counter[tuple[str, int, int, float]] = Counter()
    for text in run.journal_file.read_text().splitlines():
        line = json.loads(text)
        for key, value in line.items():
            if key not in ("step", "time"):
                found[key, line["step"], int(line["time"] * 1000), value] += 1
    return found


def in_store(run: Run) -> Counter[tuple[str, int, int, float]]:
    client, run_id = store_of(run)
    found: Counter[tuple[str, int, int, float]] = Counter()
    for key in client.get_run(run_id).data.metrics:
        for each in client.get_metric_history(run_id, key):
            found[each.key, each.step, each.timestamp, each.value] += 1
    return found


def store_of(run: Run) -> tuple[MlflowClient, str]:
    cursor = Cursor.load(run)
    assert cursor.run_id
    return MlflowClient(cursor.uri), cursor.run_id


def runs_in_store(run: Run) -> list[Any]:
    client, _ = store_of(run)
    experiment = client.get_experiment_by_name("demo")
    return list(client.search_runs([experiment.experiment_id]))


def until(condition: Callable[[], Any], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this took too long"
        time.sleep(0.02)


def sync(run: Run, again: bool = False) -> Shipped:
    [shipped] = sync_all([run], again=again)
    assert isinstance(shipped, Shipped)
    return shipped


def command(run: Run, *options: str) -> list[str]:
    return [sys.executable, "-m", "atlas.cli", "sync", str(run.path), *options]


# --- what is stored


def test_everything_about_a_run_is_in_the_store(outputs: Path) -> None:
    run = make_run(outputs, log_best=True)
    write(run, range(30))
    best = run.checkpoints / "00000020"
    best.mkdir()
    (best / "model.pt").write_bytes(b"weights")
    (run.checkpoints / "best").symlink_to(best.name)
    run.update_status(state="finished", step=30)

    shipped = sync(run)

    assert (shipped.sent, shipped.left, shipped.error) == (63, 0, None)
    assert in_store(run) == in_journal(run)
    client, run_id = store_of(run)
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == f"{run.id} seed=1"
    assert found.info.start_time == int(run.read_status().created * 1000)
    assert found.info.end_time >= found.info.start_time
    assert found.data.params["optim.lr"] == "0.001"
    assert found.data.params["effective_batch"] == "32"
    assert "data.workers" not in found.data.params
    tags = found.data.tags
    assert tags["config.data.workers"] == "2" and tags["config.data.batch_size"] == "8"
    assert tags["atlas.run_id"] == run.id and tags["atlas.state"] == "finished"
    assert tags["atlas.overrides"] == "seed=1 data.workers=2"
    assert {"atlas.host", "atlas.command", "atlas.torch", "atlas.world_size"} <= tags.keys()
    files = {file.path for file in client.list_artifacts(run_id)}
    assert files == {"config.yaml", "report.png", "best"}
    root = outputs / "mlartifacts" / run_id / "artifacts"
    assert (root / "config.yaml").read_text() == run.config_file.read_text()
    assert (root / "best" / "model.pt").read_bytes() == b"weights"
    assert run.read_status().mlflow_run_id == run_id


def test_sending_again_changes_nothing(outputs: Path) -> None:
    run = make_run(outputs)
    write(run, range(30))
    sync(run)
    assert sync(run).sent == 0
    assert sync(run, again=True).sent == 63
    run.mlflow_file.unlink()  # killed between creating the MLflow run and noting it
    assert sync(run).sent == 63
    assert in_store(run) == in_journal(run)
    assert len(runs_in_store(run)) == 1


def test_a_torn_last_line_waits_for_its_rest(outputs: Path) -> None:
    run = make_run(outputs)
    write(run, range(10))
    whole = run.journal_file.read_bytes()
    run.journal_file.write_bytes(whole[:-20])
    sync(run)
    assert sum(in_store(run).values()) == 20
    run.journal_file.write_bytes(whole)
    assert sync(run).sent == 1
    assert in_store(run) == in_journal(run)


def test_values_and_names_that_mlflow_does_not_take(outputs: Path) -> None:
    run = make_run(outputs)
    run.journal_file.write_text(
        '{"step": 0, "time": 1.5, "train/loss": NaN, "lr/a[0]": 1.0, "lr/a.0": 2.0, "n": null}\n'
        "this is no line\n"
        '{"step": 1, "time": 2.5, "train/loss": Infinity, "words": "no", "flag": true, "//x": 3}\n'
        '{"step": 2, "time": 3.5, "train/loss": 0.25}\n'
    )
    assert sync(run).left == 0
    stored = in_store(run)
    assert sorted(key for key, *_ in stored) == sorted(
        ["train/loss", "train/loss", "train/loss", "lr/a.0", "lr/a.0_", "flag", "x"]
    )
    values = {step: value for (key, step, _, value) in stored if key == "train/loss"}
    assert math.isnan(values[0]) and values[1] > 1e308 and values[2] == 0.25


@pytest.mark.parametrize(
    ("key", "valid"),
    [
        ("train/loss", "train/loss"),
        ("lr/a[0]", "lr/a.0"),
        ("lr/blocks[1][w]", "lr/blocks.1.w"),
        ("a(b)%", "a_b__"),
        ("/a//b/", "a/b"),
        ("../a", "_/a"),
        ("", "_"),
        ("[0]", "_0"),
        ("é 1:2-3", "é 1:2-3"),
        ("k" * 300, "k" * 250),
    ],
)
def test_keys_become_valid(key: str, valid: str) -> None:
    assert valid_key(key) == valid


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("finished", "FINISHED"),
        ("failed", "FAILED"),
        ("killed", "KILLED"),
        ("preempted", "RUNNING"),
        ("running", "KILLED"),  # and nobody holds the lock
    ],
)
def test_the_final_state(outputs: Path, state: str, status: str) -> None:
    run = make_run(outputs)
    write(run, range(2))
    run.update_status(state=state, reason="because")
    sync(run)
    client, run_id = store_of(run)
    found = client.get_run(run_id)
    assert found.info.status == status
    assert found.data.tags["atlas.reason"] == "because"


def test_a_resumed_run_is_the_same_mlflow_run(outputs: Path) -> None:
    run = make_run(outputs)
    write(run, range(10))
    run.update_status(state="killed")
    sync(run)
    client, run_id = store_of(run)
    lock = run.lock
    lock.acquire()
    run.update_status(state="running")
    write(run, range(10, 20))
    sync(run)
    assert client.get_run(run_id).info.status == "RUNNING"
    lock.release()
    run.update_status(state="finished")
    sync(run)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert in_store(run) == in_journal(run)
    assert len(runs_in_store(run)) == 1


def test_an_equal_run_started_over_is_another_mlflow_run(outputs: Path) -> None:
    run = make_run(outputs)
    write(run, range(10))
    sync(run)
    old = run.move_aside()
    run = make_run(outputs)
    write(run, range(5))
    sync(run)
    assert len(runs_in_store(run)) == 2
    assert in_store(run) == in_journal(run)
    assert old and sync(Run(old)).sent == 0


def test_a_store_that_lost_the_run_gets_it_again(outputs: Path, empty_store: Path) -> None:
    run = make_run(outputs)
    write(run, range(10))
    sync(run)
    client, run_id = store_of(run)
    client.delete_run(run_id)
    shipped = sync_briefly(run)
    assert shipped.error and unnamed(shipped.error, run_id, "mlflow.json") == []
    other = outputs.parent / "other.db"
    shutil.copy(empty_store, other)
    config = yaml.safe_load(run.config_file.read_text())
    config["tracking"]["uri"] = f"sqlite:///{other}"
    run.config_file.write_text(yaml.safe_dump(config))
    assert sync(run).sent == 21
    assert in_store(run) == in_journal(run)


def sync_briefly(run: Run) -> Shipped:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipping, "GIVE_UP_S", 0.0)
        patch.setattr(shipping, "TRIES", 1)
        return sync(run)


# --- processes


def test_a_shipper_sends_a_growing_journal(outputs: Path) -> None:
    run = make_run(outputs)
    lock = run.lock
    lock.acquire()
    shipper = open_shipper(run, TrackingSettings.of(run.read_config()))
    shipper.start()
    for part in range(4):
        write(run, range(100 * part, 100 * part + 100))
        time.sleep(0.3)
    until(lambda: Cursor.load(run).shipped)
    assert shipper.warning() is None
    run.update_status(launcher="late", host="known")
    run.update_status(state="finished")
    assert shipper.finish(30) is None
    assert shipper.finish(1) is None
    lock.release()
    assert in_store(run) == in_journal(run)
    client, run_id = store_of(run)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert client.get_run(run_id).data.tags["atlas.launcher"] == "late"
    run.update_status()
    assert run.read_status().mlflow_run_id == run_id
    assert run.report_file.exists()
    assert (run.logs / "sync.log").read_text().count("\n") == 1


def test_a_shipper_outlives_a_killed_writer_and_ends(outputs: Path) -> None:
    run = make_run(outputs)
    writer = subprocess.Popen(
        [sys.executable, "-c", FOLLOWED, str(run.path)], stdout=subprocess.PIPE
    )
    assert writer.stdout and writer.stdout.readline()
    child = shipper_of(writer.pid)
    for signum in (signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):  # as to all of a job's processes
        os.kill(child, signum)
    until(lambda: Cursor.load(run).shipped)
    assert "/libtorch" not in Path(f"/proc/{child}/maps").read_text()
    assert writer.stdout.readline()
    writer.kill()
    writer.wait()
    writer.stdout.close()
    until(lambda: not Path(f"/proc/{child}").exists())
    assert in_store(run) == in_journal(run)
    client, run_id = store_of(run)
    assert client.get_run(run_id).info.status == "KILLED"
    assert run.read_status().mlflow_run_id == run_id


def test_a_run_that_is_over_at_once(outputs: Path) -> None:
    run = make_run(outputs)
    shipper = ProcessShipper([run])
    shipper.start()
    write(run, range(2))
    run.update_status(state="failed", reason="at once")
    assert shipper.finish() is None
    assert in_store(run) == in_journal(run)
    client, run_id = store_of(run)
    assert client.get_run(run_id).info.status == "FAILED"


def shipper_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def test_killed_in_the_middle_and_run_again(outputs: Path) -> None:
    run = make_run(outputs)
    write(run, range(3000))
    child = subprocess.Popen(command(run))
    until(lambda: Cursor.load(run).shipped)
    child.kill()
    child.wait()
    assert 0 < Cursor.load(run).points_left(run) < 6300
    assert sync(run).left == 0
    assert in_store(run) == in_journal(run)


def test_two_at_once(outputs: Path) -> None:
    run = make_run(outputs)
    write(run, range(500))
    twin = subprocess.Popen([sys.executable, "-c", SENT, str(run.path)], stdout=subprocess.PIPE)
    until((run.path / ".sync.lock").exists)
    waited = sync(run)
    assert waited.sent + int(twin.communicate()[0]) == 1050
    assert in_store(run) == in_journal(run)
    lock = run.lock
    lock.acquire()
    held = SyncLock(run, Parent(listen=False))
    assert held.acquire(is_over=True)
    with pytest.raises(AtlasError) as refused:
        sync(run)
    held.release()
    assert unnamed(str(refused.value), run.id, os.getpid(), run.logs / "sync.log") == []
    lock.release()


# --- stores that fail


def test_an_unreachable_store_is_a_warning(outputs: Path, capsys: pytest.CaptureFixture) -> None:
    uri = f"http://person:secret@127.0.0.1:{free_port()}"
    run = make_run(outputs, uri=uri)
    shipper = ProcessShipper([run])
    shipper.start()
    write(run, range(10))
    until(shipper.warning)
    warning = shipper.warning()
    refused = os.strerror(errno.ECONNREFUSED)
    assert warning and unnamed(warning, refused, "metrics.jsonl") == []
    assert uri.rpartition("@")[2] in warning and f'{refused}"' not in warning
    missing = shipper.finish(0.5)
    assert missing and unnamed(missing, 21, refused, f"atlas sync {run.path}") == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipping, "GIVE_UP_S", 0.0)
        assert main(["sync", str(run.path)]) == 1
    shown = "".join(capsys.readouterr()) + warning + missing
    kept = [path.read_text() for path in run.path.rglob("*") if path.suffix in (".json", ".log")]
    assert refused in shown
    assert not [text for text in [shown, *kept] if "secret" in text]
    assert run.report_file.exists()


class Proxy:
    """Stands before a server and lets through, or does not: `mode(body)` answers with a status.

    None passes the request on, 0 leaves it hanging, -1 passes it on and loses the answer.
    """

    def __init__(self, port: int) -> None:
        self.mode: Callable[[str, bytes], int | None] = lambda path, body: None
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status = proxy.mode(self.path, body)
                if status is None or status == -1:
                    server = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
                    server.request(self.command, self.path, body, dict(self.headers))
                    answer = server.getresponse()
                    answered = answer.read()
                    server.close()
                    if status == -1:
                        return
                    status, body = answer.status, answered
                elif status:
                    body = b'{"error_code": "%s", "message": "no"}' % (
                        b"INVALID_PARAMETER_VALUE" if status == 400 else b"INTERNAL_ERROR"
                    )
                else:
                    time.sleep(3)
                    return
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_any

            def log_message(self, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Server:
    """A real `mlflow server` on loopback, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        arguments = f"--backend-store-uri sqlite:///{self.folder}/mlflow.db --workers 1"
        arguments += f" --artifacts-destination {self.folder}/artifacts --port {self.port}"
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *arguments.split()],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> None:
        until(self.answers, 90)

    def answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        with contextlib.suppress(OSError):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_store, folder / "mlflow.db")
    server = Server(folder)
    server.wait()
    yield server
    server.kill()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.server.shutdown()
    proxy.server.server_close()


def test_a_server_that_fails_now_and_then(outputs: Path, proxy: Proxy) -> None:
    """Answers 500, hangs, takes a batch and loses the answer: every point is there once."""
    run = make_run(outputs, uri=proxy.uri)
    write(run, range(600))
    answers = iter([-1, 500, None, 0, None, -1])
    seen: list[str] = []

    def mode(path: str, body: bytes) -> int | None:
        seen.append(path)
        if "runs/create" in path and seen.count(path) == 1:
            return -1
        return next(answers, None) if b'"metrics": [{' in body else None

    proxy.mode = mode
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
        patch.setattr(shipping, "GIVE_UP_S", 60.0)
        shipped = sync(run)
    assert (shipped.left, shipped.error) == (0, None)
    assert next(answers, "none left") == "none left"
    proxy.mode = lambda path, body: None
    assert in_store(run) == in_journal(run)
    assert len([r for r in runs_in_store(run) if r.data.tags["atlas.run_id"] == run.id]) == 1
    client, run_id = store_of(run)
    assert {f.path for f in client.list_artifacts(run_id)} == {"config.yaml", "report.png"}


def test_a_point_that_is_refused_holds_up_nothing(outputs: Path, proxy: Proxy) -> None:
    run = make_run(outputs, seed=2, uri=proxy.uri)
    write(run, range(40))
    run.journal_file.write_text(
        run.journal_file.read_text()
        + '{"step": 40, "time": 9.5, "bad": 1.0, "train/loss": NaN}\n'
        + '{"step": 41, "time": 9.6, "bad": 2.0}\n'
    )
    proxy.mode = lambda path, body: 400 if b'"bad"' in body else None
    shipped = sync(run)
    assert (shipped.sent, shipped.refused, shipped.left) == (85, 2, 0)
    assert unnamed(str(shipped), 85, 2) == []
    expected = Counter(each for each in in_journal(run) if each[0] != "bad" and each[1] != 40)
    assert Counter(each for each in in_store(run) if each[1] != 40) == expected


def test_the_environment_names_the_store_and_the_run_remembers_it(
    outputs: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(outputs, seed=3)
    write(run, range(5))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    sync(run)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    write(run, range(5, 10))
    assert sync(run).uri == server.uri
    assert in_store(run) == in_journal(run)


@pytest.mark.slow
def test_a_server_killed_and_started_again(outputs: Path, tmp_path: Path) -> None:
    server = Server(tmp_path)
    run = make_run(outputs, uri=server.uri)
    shipper = ProcessShipper([run])
    shipper.start()  # before the server answers
    write(run, range(500))
    server.wait()
    until(lambda: Cursor.load(run).shipped >= 1000, 60)
    for part in range(1, 4):
        write(run, range(500 * part, 500 * part + 500))
        time.sleep(0.5 * part)
        server.kill()
        time.sleep(1)
        server.start()
        server.wait()
    run.update_status(state="finished")
    assert shipper.finish(60) is None
    assert in_store(run) == in_journal(run)
    assert len(runs_in_store(run)) == 1
    server.kill()


@pytest.mark.slow
def test_eight_runs_at_once_into_a_new_store(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, seed=seed) for seed in range(8)]
    for run in runs:
        write(run, range(400))
        run.update_status(state="finished")
    children = [subprocess.Popen(command(run), stdout=subprocess.DEVNULL) for run in runs]
    assert [child.wait(200) for child in children] == [0] * 8
    assert all(in_store(run) == in_journal(run) for run in runs)
    assert len(runs_in_store(runs[0])) == 8


@pytest.mark.slow
def test_killed_while_the_store_is_made(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write(run, range(10))
    child = subprocess.Popen(command(run))
    until(lambda: (tmp_path / ".mlflow.db.new").exists() or (tmp_path / "mlflow.db").exists())
    time.sleep(0.2)
    child.kill()
    child.wait()
    assert sync(run).left == 0
    assert in_store(run) == in_journal(run)


@pytest.mark.slow
def test_one_process_sends_the_runs_of_a_pool(outputs: Path) -> None:
    base, *rest = quick(outputs, "tracking=mlflow", "seed=1,2,3", "trainer.steps=12")
    train(base, "-m", *rest)
    runs = [Run(path.parent) for path in outputs.glob("quick/*/config.yaml")]
    assert len(runs) == 3
    parents = set()
    for run in runs:
        assert in_store(run) == in_journal(run)
        client, run_id = store_of(run)
        found = client.get_run(run_id)
        assert found.info.status == "FINISHED" and run.read_status().mlflow_run_id == run_id
        parents.add(found.data.tags["mlflow.parentRunId"])
        assert run.report_file.exists() and not (run.logs / "sync.log").exists()
    [parent] = parents
    assert client.get_run(parent).data.metrics["runs/finished"] == 3.0
    assert (outputs / "quick" / "sync.log").read_text().count("\n") == 3


# --- without tracking


def test_without_tracking_mlflow_is_not_imported(outputs: Path) -> None:
    run = make_run(outputs, kind="none")
    write(run, range(10))
    code = (
        "import sys; from atlas.cli import main; assert main(['sync', sys.argv[1]]) == 0;"
        "print([m for m in ('mlflow', 'torch', 'atlas.record.shipping.shipment') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert run.report_file.exists() and not run.mlflow_file.exists()
    run.report_file.unlink()
    shipper = open_shipper(run, TrackingSettings.of(run.read_config()))
    assert isinstance(shipper, ReportShipper)
    shipper.start()
    assert shipper.warning() is None and shipper.finish() is None
    until(run.report_file.exists)


def test_the_two_tracking_files_have_the_same_keys() -> None:
    read = [
        yaml.safe_load((ROOT / f"conf/tracking/{kind}.yaml").read_text())
        for kind in ("mlflow", "none")
    ]
    assert read[0].keys() == read[1].keys()
    assert [each["kind"] for each in read] == ["mlflow", "none"]


def test_an_unknown_run_is_a_message(capsys: pytest.CaptureFixture, outputs: Path) -> None:
    assert main(["sync", "abcdef", "--outputs", str(outputs)]) == 1
    assert unnamed(capsys.readouterr().err, "atlas sync", "abcdef", outputs) == []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
