"""Jobs on one node of a real Slurm: submitted, preempted, cancelled, broken, sent again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import (
    OWN,
    ROOT,
    command,
    environment,
    only_run,
    points,
    quick,
    status,
    train,
    unnamed,
    wait_for_step,
    weights,
)
from hydra import compose, initialize_config_dir
from jobs import (
    arguments,
    assert_twins,
    ended,
    field,
    finished,
    job_of,
    log,
    process_of,
    slurm,
    submit,
    until,
)

from atlas.errors import RunBusyError
from atlas.record.journal import TIMINGS
from atlas.run.directory import Run
from atlas.run.provenance import Provenance
from launchers.launch import resolve
from launchers.slurm.launcher import SlurmLauncher
from launchers.slurm.queue import array_limit, job_state

pytestmark = pytest.mark.usefixtures("one_node")
SLOW = ("model.pause=0.1", "trainer.save_interval=null")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Two ranks on this machine, without Slurm, to which nothing happens."""
    outputs = tmp_path_factory.mktemp("undisturbed")
    train(*quick(outputs, "cluster.device=cpu", "cluster.nproc_per_node=2"))
    return only_run(outputs)


def test_two_ranks_end_as_they_do_without_slurm(tmp_path, undisturbed):
    run, job = submit(tmp_path)
    first = status(run)
    assert first["launcher"] == "slurm" and first["job_id"] == job
    assert first["state"] in ("queued", "running")
    finished(run, job)
    assert_twins(run, undisturbed)
    last = status(run)
    assert last["job_id"] == job and last["restarts"] == 0
    # Once more starts nothing.
    assert unnamed(train(*arguments(tmp_path)).stdout, run.name, "fresh=true") == []
    assert status(run) == last and not (run / "slurm" / "2").exists()


def test_submitting_does_not_import_torch(tmp_path):
    probe = (
        "import runpy, sys, atexit; atexit.register(lambda: print('torch' in sys.modules, "
        "'mlflow' in sys.modules)); sys.argv[0] = 'train.py'; "
        "runpy.run_path('train.py', run_name='__main__')"
    )
    given = arguments(tmp_path, "+cluster.sbatch.begin=now+1hour")
    done = subprocess.run(
        [sys.executable, "-c", probe, *given],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
    )
    assert done.stdout.splitlines()[-1] == "False False", done.stdout + done.stderr
    slurm("scancel", job_of(only_run(tmp_path), done.stdout))


def test_preempted_and_requeued_to_the_same_end(tmp_path, undisturbed):
    # A preemption uses up none of the requeues for time limits, under a short limit neither; and
    # Slurm signals the processes that read data too.
    strict = ("cluster.timeout_min=10", "cluster.max_requeues=0", "data.workers=1")
    run, job = submit(tmp_path, *SLOW, *strict)
    wait_for_step(tmp_path, 8)
    # What a kill in the middle of an earlier requeue would have left.
    (run / "slurm" / "1" / f"{job}_submitted.pkl.save_tmp").touch()
    slurm("scancel", "--signal=USR2", job)
    until(lambda: status(run)["state"] == "preempted", "the run is preempted")
    stopped = status(run)
    assert stopped["state"] == "preempted" and 8 <= stopped["step"] < 24, log(run, job)
    assert (run / "checkpoints" / f"{stopped['step']:08d}").exists()
    finished(run, job)
    assert field(job, "Restarts") == "1"
    assert status(run)["restarts"] == 1
    assert unnamed(log(run, job), "preempted") == []
    assert_twins(run, undisturbed)


def test_preempted_before_python_has_started(tmp_path, undisturbed):
    run, job = submit(tmp_path)
    until(lambda: field(job, "JobState") == "RUNNING", "the job starts")
    until(lambda: process_of(job, 0, started=False), "its first process starts")
    slurm("scancel", "--signal=USR2", job)
    finished(run, job)
    assert_twins(run, undisturbed)


def test_scancel_saves_and_does_not_requeue(tmp_path, undisturbed):
    run, job = submit(tmp_path, *SLOW)
    wait_for_step(tmp_path, 8)
    slurm("scancel", job)
    assert ended(job)[0] == "CANCELLED"
    stopped = status(run)
    assert stopped["state"] == "killed" and "SIGTERM" in stopped["reason"]
    assert (run / "checkpoints" / f"{stopped['step']:08d}").exists()
    assert field(job, "Restarts") == "0"
    # The same command goes on, as another job with a folder of its own.
    again = job_of(run, train(*arguments(tmp_path, *SLOW)).stdout)
    assert again != job and (run / "slurm" / "2").is_dir()
    finished(run, again)
    assert status(run)["restarts"] == 1
    assert_twins(run, undisturbed)


def test_array_of_six(tmp_path):
    launcher, runs = runs_of_array(tmp_path, 6, "cluster.nproc_per_node=1")
    handles = launcher.submit(runs)
    main = {handle.job_id.partition("_")[0] for handle in handles}
    assert len(main) == 1
    assert [handle.job_id.partition("_")[2] for handle in handles] == list("012345")
    assert len({handle.describe() for handle in handles}) == 1
    assert field(main.pop(), "ArrayTaskThrottle") == "3"
    assert [handle.wait() for handle in handles] == [0] * 6
    for run, handle in zip(runs, handles, strict=True):
        assert run.read_status().state == "finished" and run.read_status().job_id == handle.job_id
        assert (run.path / "slurm" / "1" / f"{handle.job_id}_0_log.out").exists()
    ends = {str(weights(run.path)["model"]["encoder.bias"].tolist()) for run in runs}
    assert len(ends) == 6


def test_arrays_stay_below_the_cluster_s_limit(tmp_path, monkeypatch):
    launcher, runs = runs_of_array(tmp_path, 5, "+cluster.sbatch.begin=now+1hour")
    assert array_limit() == 1001
    monkeypatch.setattr("launchers.slurm.launcher.array_limit", lambda: 2)
    handles = launcher.submit(runs)
    mains = [handle.job_id.partition("_")[0] for handle in handles]
    assert mains[0] == mains[1] != mains[2] == mains[3] != mains[4]
    assert "_" not in handles[4].job_id
    try:
        assert all(launcher.is_active(run) for run in runs)
        with pytest.raises(RunBusyError) as error:
            launcher.submit(runs)
        stops = [f"scancel {handle.job_id}" for handle in handles[:2]]  # of the first array
        assert unnamed(str(error.value), "PENDING", *stops) == []
    finally:
        for handle in handles:
            handle.cancel()
    assert all(job_state(handle.job_id) in ("CANCELLED", None) for handle in handles)


def runs_of_array(outputs: Path, count: int, *more: str) -> tuple[SlurmLauncher, list[Run]]:
    """A launcher and created runs that differ in their seed, as a sweep hands them over."""
    runs = []
    given = [
        a for a in arguments(outputs, *more, "trainer.steps=4", "schedule.warmup=1") if a[0] != "-"
    ]
    for seed in range(count):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            overrides = [*given, f"seed={seed}", f"hydra.searchpath=[file://{OWN}]"]
            config = resolve(compose("config", [*overrides, "cluster.array_parallelism=3"]))
        cluster = {k: v for k, v in config["cluster"].items() if k != "_target_"}
        launcher = SlurmLauncher(**cluster)
        launcher.check()
        runs.append(Run.locate(config, launcher.world_size))
        runs[-1].create(config, launcher.world_size, Provenance.collect([], [str(OWN)]))
    return launcher, runs


def test_sent_again_while_queued_is_refused(tmp_path):
    later = "+cluster.sbatch.begin=now+1hour"
    run, job = submit(tmp_path, later)
    for more in ((), ("fresh=true",), (f"resume={run.name}",)):
        given = ["cluster=slurm", "cluster.device=cpu", "cluster.nproc_per_node=2", *more]
        given = given if "resume" in str(more) else arguments(tmp_path, *more)
        refused = train(*given, f"outputs={tmp_path}", code=1)
        assert unnamed(refused.stderr, run.name, "PENDING", f"scancel {job}") == []
    assert only_run(tmp_path) == run
    # A job id that has begun again, in a controller set up anew, is another run's.
    other, its_job = submit(tmp_path / "other", later)
    text = (other / "status.json").read_text()
    (other / "status.json").write_text(text.replace(f'"{its_job}"', f'"{job}"'))
    third = job_of(other, train(*arguments(tmp_path / "other", later)).stdout)
    slurm("scancel", job, its_job, third)
    # The job is gone and the run has never begun: now it is sent.
    assert status(run)["state"] == "queued"
    again = job_of(run, train(*arguments(tmp_path)).stdout)
    assert again != job
    finished(run, again)


def test_a_rank_that_dies_fails_the_job(tmp_path):
    run, job = submit(tmp_path, *SLOW)
    after = slurm(
        "sbatch", "--parsable", f"--dependency=afterok:{job}", "--wrap=true", "-o/dev/null"
    )
    wait_for_step(tmp_path, 8)
    os.kill(process_of(job, 1), signal.SIGKILL)
    state, code = ended(job)
    assert state == "FAILED" and code not in ("0:0", "75:0")
    never = "DependencyNeverSatisfied"
    until(lambda: field(after, "Reason") == never, "the dependant is given up")
    slurm("scancel", after)
    assert "task 1" in log(run, job) and "Killed" in log(run, job)
    assert status(run)["state"] == "failed"
    # The kind, and srun's words.
    assert unnamed(status(run)["reason"], "out of memory", "task 1: Killed") == []


def test_an_error_in_one_rank_is_the_reason_that_is_told(tmp_path):
    brittle = ("data.train._target_=parts.Brittle", *SLOW)
    run, job = submit(tmp_path, *brittle, PYTHONPATH=str(Path(__file__).parent))
    assert ended(job) == ("FAILED", "1:0")
    words = "RuntimeError: sample 7 cannot be read"  # which are the data set's
    assert words in log(run, job, rank=0) and "Traceback" in log(run, job, rank=1)
    first, stopped = Run(run).read_failure(), status(run)
    assert stopped["state"] == "failed" and first["rank"] == 1
    assert unnamed(stopped["reason"], "1", first["host"], words) == []


def faulty(outputs, how, rank, after, *more):
    """A run of two ranks that are saved every second update and break by then."""
    data = ("data.train._target_=parts.Faulty", f"+data.train.how={how}")
    data = (*data, f"+data.train.rank={rank}", f"+data.train.after={after}")
    return submit(
        outputs, *data, "trainer.save_interval=2", *more, PYTHONPATH=str(Path(__file__).parent)
    )


@pytest.mark.parametrize(
    "how, rank", [pytest.param("raise", 1, marks=pytest.mark.slow), ("SIGSEGV", 0)]
)
def test_a_crash_is_tried_again_where_a_checkpoint_has_advanced(tmp_path, undisturbed, how, rank):
    run, job = faulty(tmp_path, how, rank, [100])
    finished(run, job)
    assert field(job, "Restarts") == "1" and status(run)["restarts"] == 1
    assert unnamed(log(run, job), "crash") == []
    assert_twins(run, undisturbed)


@pytest.mark.parametrize(
    "how, rank, after, restarts, kind",
    [
        # The second attempt gets nowhere.
        pytest.param("raise", 1, [100, 4], "1", "crash", marks=pytest.mark.slow),
        pytest.param("SIGKILL", 1, [100], "0", "out of memory", marks=pytest.mark.slow),
        pytest.param("SIGKILL", 0, [100], "0", "out of memory", marks=pytest.mark.slow),
        pytest.param("infinite", 1, [100], "0", "NaN", marks=pytest.mark.slow),
    ],
)
def test_a_failure_that_is_not_tried_again(tmp_path, how, rank, after, restarts, kind):
    from atlas.record.shipping.mlflow_store import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run, job = faulty(tmp_path, how, rank, after, "tracking=mlflow", f"tracking.uri={uri}")
    assert ended(job)[0] == "FAILED"
    assert field(job, "Restarts") == restarts and status(run)["restarts"] == int(restarts)
    assert status(run)["state"] == "failed" and kind in status(run)["reason"]
    first = Run(run).read_failure()
    assert first["kind"] == kind
    if how != "raise":  # then both ranks exit at once, and srun may name them together
        assert first["rank"] == rank
    assert (
        unnamed(log(run, job).splitlines()[-1], "failed", first["rank"], first["host"], kind) == []
    )
    # Not what rank 0 has seen of it, which it sent before the first reason was known.
    sent = MlflowClient(tracking_uri=uri).get_run(status(run)["mlflow_run_id"])
    assert sent.data.tags["atlas.reason"] == status(run)["reason"]
    assert sent.info.status == "FAILED"


def test_an_error_in_all_ranks_ends_the_job(tmp_path):
    run, job = submit(tmp_path, "+data.train.bad=7")
    assert ended(job) == ("FAILED", "1:0")
    assert status(run)["state"] == "failed" and Run(run).read_failure()["kind"] == "NaN"
    for told in (log(run, job), status(run)["reason"]):
        assert unnamed(told, "NaN", "NonFiniteError") == []


def test_submitted_from_inside_a_job(tmp_path):
    inner = " ".join(f"'{word}'" for word in command(*arguments(tmp_path / "inner")))
    script = tmp_path / "outer.sh"
    # What an allocation leaves in the environment, and would be options of the inner job.
    script.write_text(
        "#!/bin/bash\nexport SBATCH_TIMELIMIT=nonsense SLURM_CPU_BIND=map_cpu:0 SLURM_NTASKS=5 "
        f"RANK=3 MASTER_ADDR=nowhere\nexec {inner}\n"
    )
    options = ("--ntasks=3", "-o", str(tmp_path / "outer.out"))
    outer = slurm("sbatch", "--parsable", *options, str(script))
    assert ended(outer) == ("COMPLETED", "0:0"), (tmp_path / "outer.out").read_text()
    run = only_run(tmp_path / "inner")
    job = job_of(run, (tmp_path / "outer.out").read_text())
    finished(run, job)
    assert status(run)["world_size"] == 2


@pytest.mark.slow
def test_without_accounting(tmp_path):
    shims = tmp_path / "shims"
    shims.mkdir()
    (shims / "sacct").write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\nexit 1\n")
    (shims / "sacct").chmod(0o755)
    path = f"{shims}:{os.environ['PATH']}"
    done = train(*arguments(tmp_path / "good", "cluster.wait=true"), PATH=path)
    assert status(only_run(tmp_path / "good"))["state"] == "finished", done.stdout
    bad = ("cluster.wait=true", "+data.train.bad=7")
    train(*arguments(tmp_path / "bad", *bad), PATH=path, code=1)
    assert status(only_run(tmp_path / "bad"))["state"] == "failed"
    assert not (tmp_path / "asked").exists()


def test_a_wrong_multiplier_is_refused_before_sbatch(tmp_path):
    before = slurm("scontrol", "show", "job", "-o").count("JobId=")
    full = ("cluster.preflight=full", "+optim.lr_multipliers.encoderr=0")
    refused = train(*arguments(tmp_path, *full), code=1)
    # Suggested, and listed with the others.
    assert unnamed(refused.stderr, "optim.lr_multipliers.encoderr", "encoder", "encoder") == []
    assert not list(tmp_path.glob("*/*/config.yaml"))
    assert slurm("scontrol", "show", "job", "-o").count("JobId=") == before


def test_what_slurm_refuses_is_told_in_its_words(tmp_path):
    refused = train(*arguments(tmp_path, "cluster.partition=nowhere"), code=1)
    assert unnamed(refused.stderr, "sbatch", "invalid partition specified: nowhere") == []


@pytest.mark.slow
def test_eight_ranks(tmp_path):
    run, job = submit(tmp_path, ranks=8)
    finished(run, job, timeout=240)
    train(*quick(tmp_path / "local", "cluster.device=cpu", "cluster.nproc_per_node=8"))
    assert_twins(run, only_run(tmp_path / "local"))


@pytest.mark.slow
def test_a_time_limit_requeues_as_often_as_allowed(tmp_path, undisturbed):
    # Slurm sends the signal 20 to 50 s before the end of its shortest limit, a minute.
    slow = ("model.pause=1.2", "trainer.save_interval=null")
    limit = ("cluster.timeout_min=1", "cluster.signal_delay_s=20", "cluster.max_requeues=1")
    run, job = submit(tmp_path, *slow, *limit)
    state, code = ended(job, timeout=240)
    assert field(job, "Restarts") == "1"
    if status(run)["state"] != "finished":  # the second attempt met the limit too
        assert (state, code) == ("FAILED", "75:0")
        assert unnamed(status(run)["reason"], "cluster.max_requeues") == []
        done = train(*arguments(tmp_path, *slow, *limit, "cluster.timeout_min=10"))
        finished(run, job_of(run, done.stdout))
    assert_twins(run, undisturbed)


@pytest.mark.slow
def test_preempted_by_a_job_of_a_higher_partition(tmp_path, undisturbed):
    run, job = submit(tmp_path, *SLOW, "+cluster.sbatch.exclusive=true")
    wait_for_step(tmp_path, 8)
    urgent = slurm(
        "sbatch", "--parsable", "-p", "urgent", "--exclusive", "-o/dev/null", "--wrap=sleep 5"
    )
    finished(run, job, timeout=240)
    assert field(urgent, "JobState") == "COMPLETED"
    assert field(job, "Restarts") == "1"
    assert status(run)["restarts"] == 1
    assert_twins(run, undisturbed)


@pytest.mark.slow
def test_the_job_waits_for_the_last_metrics(tmp_path, undisturbed):
    from atlas.record.shipping.mlflow_store import MlflowClient

    run, job = submit(tmp_path, "tracking=mlflow", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
    finished(run, job, timeout=240)
    sent = json.loads((run / "mlflow.json").read_text())
    assert sent["offset"] == (run / "metrics.jsonl").stat().st_size
    assert status(run)["mlflow_run_id"] == sent["run_id"]
    # MLflow has the curves of the run that had no Slurm, point by point.
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    curves = {
        (point.step, key): point.value
        for key in client.get_run(sent["run_id"]).data.metrics
        if key not in TIMINGS
        for point in client.get_metric_history(sent["run_id"], key)
    }
    assert curves == points(undisturbed)


@pytest.mark.slow
def test_a_sweep_issued_twice_and_then_wider(tmp_path):
    given = [*arguments(tmp_path, "trainer.steps=4", "schedule.warmup=0,1", ranks=1)]
    sweep = ["-m", "--config-dir", str(OWN), *given[1:]]
    printed = train(*sweep, "optim.lr=1e-3,2e-3").stdout
    first = jobs_of(tmp_path)
    (array,) = {job.partition("_")[0] for job in first.values()}
    assert len(first) == 4 and unnamed(printed, f"scancel {array}") == []
    again = train(*sweep, "optim.lr=1e-3,2e-3").stdout
    assert jobs_of(tmp_path) == first and "scancel" not in again
    until(lambda: array not in slurm("squeue", "-h"), "the array ends", 120)
    again = train(*sweep, "optim.lr=1e-3,2e-3").stdout
    assert jobs_of(tmp_path) == first and unnamed(again, *["finished"] * 4) == []
    wider = train(*sweep, "optim.lr=1e-3,2e-3,3e-3", "cluster.wait=true").stdout
    assert unnamed(wider, *["finished"] * 6) == []
    both = jobs_of(tmp_path)
    assert len(both) == 6 and both.items() > first.items()
    assert array not in {job.partition("_")[0] for run, job in both.items() if run not in first}
    assert {status(run)["state"] for run in both} == {"finished"}


def jobs_of(outputs: Path) -> dict[Path, str]:
    """The job of every run below `outputs`."""
    return {p.parent: status(p.parent)["job_id"] for p in outputs.glob("*/*/config.yaml")}
