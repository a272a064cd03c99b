"""A run that was killed ends as if it had not been."""

import random
import signal
import time

import pytest
from commands import (
    kill,
    lines,
    only_run,
    points,
    problem_keys,
    quick,
    same,
    start,
    status,
    train,
    unnamed,
    wait_for_step,
    weights,
)

from atlas.cli import main
from atlas.run.directory import Run
from atlas.run.resume import with_another_batch
from atlas.run.status import Status

WORKERS = ("data.workers=0", "data.workers=2")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run that nothing happens to; with dropout, shuffling, noise in the data and EMA."""
    outputs = tmp_path_factory.mktemp("undisturbed")
    train(*quick(outputs))
    return only_run(outputs)


def assert_twins(one, other):
    assert points(one) == points(other)
    assert lines(one / "samples.jsonl") == lines(other / "samples.jsonl")
    assert same(weights(one), weights(other))


@pytest.mark.parametrize("workers", WORKERS)
def test_killed_at_random_steps(tmp_path, undisturbed, workers):
    arguments = quick(tmp_path, "model.pause=0.01", workers, "trainer.save_interval=3")
    for step in (3, 12):
        process = start(*arguments)
        wait_for_step(tmp_path, step)
        time.sleep(random.uniform(0, 0.1))
        kill(process)
    run = only_run(tmp_path)
    stopped = status(run)["step"]
    done = train(*arguments)
    announced = done.stdout.partition(str(run))[0]
    assert unnamed(announced, run.name, stopped) == []
    # `model.pause` makes another id, and must not make another result.
    assert_twins(run, undisturbed)
    assert status(run)["state"] == "finished" and status(run)["restarts"] == 2


@pytest.mark.parametrize(
    "number, state",
    [
        (signal.SIGTERM, "killed"),
        (signal.SIGUSR2, "preempted"),
        pytest.param(signal.SIGINT, "killed", marks=pytest.mark.slow),
    ],
)
def test_stopped_by_a_signal(tmp_path, undisturbed, number, state):
    arguments = quick(tmp_path, "model.pause=0.02", "trainer.save_interval=null")
    process = start(*arguments)
    run = wait_for_step(tmp_path, 8)
    said = kill(process, number)
    assert process.returncode == 75, said
    assert f"resume={run.name}" in said
    stopped = status(run)
    assert stopped["state"] == state and stopped["reason"]
    assert (run / "checkpoints" / f"{stopped['step']:08d}").exists()
    train(*arguments)
    assert_twins(run, undisturbed)


def test_an_optimizer_draws_the_same_however_data_is_read(tmp_path):
    """Samples seed the generators that it draws from, in this process or in another."""
    runs = []
    for workers in (0, 1):
        noisy = ("optim=sgd", "optim.lr=0.01", "optim.optimizer._target_=own_parts.Noisy")
        outputs = tmp_path / str(workers)
        train(*quick(outputs, *noisy, f"data.workers={workers}", "trainer.save_interval=7"))
        runs.append(only_run(outputs))
    assert_twins(*runs)
    shares = [
        x["data_wait_share"] for x in lines(runs[0] / "metrics.jsonl") if "data_wait_share" in x
    ]
    assert shares and all(0 <= share <= 1 for share in shares)


def test_finished_run_is_not_run_again(tmp_path, undisturbed):
    outputs = undisturbed.parent.parent
    before = status(undisturbed)
    done = train(*quick(outputs))
    assert unnamed(done.stdout, "finished", undisturbed, "fresh=true") == []
    assert status(undisturbed) == before


def test_fresh_moves_the_old_run_aside(tmp_path):
    train(*quick(tmp_path, "trainer.steps=6"))
    old = only_run(tmp_path)
    mark = (old / "metrics.jsonl").read_text()
    done = train(*quick(tmp_path, "trainer.steps=6", "fresh=true"))
    aside = old.with_name(f"{old.name}.old-1")
    assert str(aside) in done.stdout
    assert (aside / "metrics.jsonl").read_text() == mark
    assert status(old)["state"] == "finished"


def test_resume_by_id_keeps_the_runs_own_configuration(tmp_path, undisturbed):
    process = start(*quick(tmp_path, "model.pause=0.02", "fresh=true"))
    run = wait_for_step(tmp_path, 5)
    kill(process)
    refused = train(f"resume={run.name}", f"outputs={tmp_path}", "seed=3", code=1)
    assert problem_keys(refused.stderr) == ["seed"]
    assert f"resume={run.name}" in refused.stderr
    train(f"resume={run.name}", f"outputs={tmp_path}", "trainer.log_interval=1")
    assert_twins(run, undisturbed)


def test_the_same_effective_batch_split_otherwise_is_the_same_run(tmp_path):
    process = start(*quick(tmp_path, "model.pause=0.02"))
    run = wait_for_step(tmp_path, 5)
    kill(process)
    train(*quick(tmp_path, "model.pause=0.02", "data.batch_size=8", "trainer.accumulate=1"))
    assert only_run(tmp_path) == run and status(run)["state"] == "finished"


def test_another_effective_batch_names_the_unfinished_run(tmp_path):
    process = start(*quick(tmp_path, "model.pause=0.02"))
    run = wait_for_step(tmp_path, 5)
    kill(process)
    done = train(*quick(tmp_path, "model.pause=0.02", "trainer.accumulate=3"))
    assert f"resume={run.name}" in done.stdout


def test_a_live_run_is_refused(tmp_path):
    process = start(*quick(tmp_path, "model.pause=0.05"))
    wait_for_step(tmp_path, 5)
    refused = train(*quick(tmp_path, "model.pause=0.05"), code=1)
    run = only_run(tmp_path)
    assert unnamed(refused.stderr, run.name, process.pid, status(run)["host"]) == []
    assert refused.stdout == ""  # nothing is said of resuming what is refused
    kill(process)


def test_a_second_interrupt_leaves_at_once(tmp_path):
    process = start(*quick(tmp_path, "model.pause=2", "trainer.accumulate=4", "trainer.steps=9"))
    while not list(tmp_path.glob("*/*/metrics.jsonl")):
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    began = time.monotonic()
    said = kill(process, signal.SIGINT)
    assert time.monotonic() - began < 4 and process.returncode == 130, said
    assert status(only_run(tmp_path))["state"] == "killed"


def test_max_time_saves_and_stops(tmp_path):
    done = train(*quick(tmp_path, "model.pause=0.2", "trainer.max_time=0.03"), code=75)
    run = only_run(tmp_path)
    assert status(run)["state"] == "killed"
    assert unnamed(status(run)["reason"], "trainer.max_time=0.03") == []
    assert unnamed(done.stdout, "killed", f"resume={run.name}") == []
    assert 0 < status(run)["step"] < 24


def test_mlflow_holds_every_point_of_a_killed_and_resumed_run_once(tmp_path):
    from atlas.record.shipping.mlflow_store import MlflowClient

    arguments = quick(tmp_path, "tracking=mlflow", "model.pause=0.03", "trainer.save_interval=3")
    process = start(*arguments)
    wait_for_step(tmp_path, 12)
    kill(process)
    train(*arguments)
    run = only_run(tmp_path)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    name = status(run)["mlflow_run_id"]
    assert client.get_run(name).info.status == "FINISHED"
    found = {}
    for key in client.get_run(name).data.metrics:
        for point in client.get_metric_history(name, key):
            assert (point.step, key) not in found
            found[point.step, key] = (point.value, point.timestamp)
    wanted = {}
    for line in lines(run / "metrics.jsonl"):
        for key, value in line.items():
            if key not in ("step", "time"):
                wanted[line["step"], key] = (value, int(line["time"] * 1000))
    assert found == wanted


def test_a_run_of_an_older_atlas_lacks_keys_that_may_be_null(tmp_path):
    process = start(*quick(tmp_path, "model.pause=0.02"))
    run = wait_for_step(tmp_path, 5)
    kill(process)
    file = run / "config.yaml"
    kept = [line for line in file.read_text().splitlines() if "max_time:" not in line]
    file.write_text("\n".join(kept) + "\n")
    train(f"resume={run.name}", f"outputs={tmp_path}")
    assert status(run)["state"] == "finished"


@pytest.mark.parametrize("text", ["", "{", "null"])
def test_a_crash_that_emptied_a_runs_files(tmp_path, capsys, text):
    """A machine that loses power can leave a file without its content."""
    run = Run(tmp_path / "name" / "0123456789")
    run.path.mkdir(parents=True)
    run.status_file.write_text(text)
    run.config_file.write_text(text)
    assert run.read_status() == Status() and run.judge_state() is None
    assert main(["sync", str(run.path)]) == 1
    assert str(run.config_file) in capsys.readouterr().err
    run.update_status(state="killed")
    config = {"data": {"batch_size": 1}, "trainer": {"accumulate": 1}}
    assert with_another_batch(Run(run.path.with_name("other")), config, 1) == []
