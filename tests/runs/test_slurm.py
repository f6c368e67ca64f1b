"""Sweeps on SLURM, with stand-ins for its commands: what is submitted, and what a task does.

What a real SLURM did with the same scripts stands in docs/clusters.md.
"""

import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from commands import calls, wait_for

ROOT = Path(__file__).parents[2]
SUBMIT, FAILURES = ROOT / "scripts/slurm_sweep.sh", ROOT / "scripts/list_failed.sh"
LINES = [f"--method so --dataset digits --shots 1 --seed {seed}" for seed in range(5)]
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def cluster(tmp_path, fake_python):
    """The environment of a sweep of five runs, where SLURM's commands note how they are called.

    sbatch notes its arguments and some variables, line by line; arrays may have three tasks.
    """
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "sbatch").write_text(
        f"""#!/usr/bin/env bash
[ -d logs ] || [ -d "$LOGS" ] || exit 1
printf '%s\\n' "$OFFSET $SEEDS" "$@" >>"{tmp_path}/sbatch.txt"
"""
    )
    (commands / "scontrol").write_text(
        f"""#!/usr/bin/env bash
case $1 in
show) echo "MaxArraySize            = 3" ;;
*) echo "$@" >>"{tmp_path}/scontrol.txt" ;;
esac
"""
    )
    (commands / "squeue").write_text('#!/usr/bin/env bash\necho "7_2 RUNNING"\n')
    for command in commands.iterdir():
        command.chmod(0o755)
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "DATA"))}
    sweep = {"DATASETS": "digits", "METHODS": "so", "SHOTS": "1", "SEEDS": "0 1 2 3 4"}
    places = {"PATH": f"{commands}:{os.environ['PATH']}", "LOGS": str(tmp_path / "my logs")}
    return {**outside, **sweep, **places, "PYTHON": str(fake_python)}


def bash(script, *arguments, environment, folder):
    done = subprocess.run(
        ["bash", script, *arguments], env=environment, cwd=folder, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def start_task(environment, folder, *arguments, **variables):
    """Start what SLURM starts: a copy of the script, in the repository's folder."""
    script = folder / "slurm_script"
    shutil.copy(SUBMIT, script)
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(
            ["bash", script, *arguments], cwd=ROOT, env=environment | variables,
            stdout=output, stderr=output,
        )  # fmt: skip


def task_of(number):
    return {"SLURM_JOB_ID": "70", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(number)}


def test_unfinished_runs_alone_are_submitted_as_the_dry_run_prints_it(cluster, tmp_path):
    (tmp_path / "finished.txt").write_text(f"{LINES[1]}\n")
    cluster["SBATCH"] = "--partition=gpu --mem=4G"
    arguments = ["--lr", "1e-3", "--template", "a {}."]
    status, out, err = bash(SUBMIT, "--dry-run", *arguments, environment=cluster, folder=tmp_path)
    assert status == 0, err
    assert not (tmp_path / "sbatch.txt").exists()
    printed = [shlex.split(x.partition(": ")[2]) for x in out.splitlines() if x.startswith("#")]
    printed_runs = [x for x in out.splitlines() if not x.startswith("#")]
    assert [x.partition(":")[0] for x in printed_runs] == ["0", "2", "3", "4"]
    assert all(x.endswith(r"--lr 1e-3 --template a\ \{\}.") for x in printed_runs)
    status, _, err = bash(SUBMIT, *arguments, environment=cluster, folder=tmp_path)
    assert status == 0, err
    submitted = (tmp_path / "sbatch.txt").read_text().splitlines()
    calls = [line[line.index("sbatch") + 1 :] for line in printed]
    # No array may have a number above 2, so the last two runs are an array of their own.
    assert submitted == ["0 0 1 2 3 4", *calls[0], "3 0 1 2 3 4", *calls[1]]
    assert "--array=0,2%16" in calls[0] and "--array=0-1%16" in calls[1]
    assert {"--export=ALL", f"--chdir={ROOT}", "--partition=gpu", "--mem=4G"} < set(calls[0])
    assert calls[0][-5:] == [str(SUBMIT), *arguments]
    assert {"SEEDS=0 1 2 3 4", "DATASETS=digits", "OFFSET=3"} < set(printed[1])


def test_what_every_task_would_fail_for_fails_the_submission(cluster, tmp_path):
    submissions = [
        ("set DATA", cluster | {"DATASETS": "dtd"}),
        ("there is no sbatch here", cluster | {"PATH": str(tmp_path / "bare")}),
    ]
    (tmp_path / "bare").mkdir()
    for command in ("bash", "dirname"):
        (tmp_path / "bare" / command).symlink_to(shutil.which(command))
    for words, environment in submissions:
        status, _, err = bash(SUBMIT, environment=environment, folder=tmp_path)
        assert status == 2 and words in err and len(err.splitlines()) == 1
    assert not (tmp_path / "sbatch.txt").exists()


def test_a_finished_sweep_submits_nothing(cluster, tmp_path):
    (tmp_path / "finished.txt").write_text("\n".join(LINES))
    assert bash(SUBMIT, environment=cluster, folder=tmp_path)[0] == 0
    assert not (tmp_path / "sbatch.txt").exists()


def test_a_task_makes_its_run_and_names_its_log_after_it(cluster, tmp_path):
    logs = Path(cluster["LOGS"])
    logs.mkdir()
    (logs / "7_0.txt").touch()  # as SLURM does before the task begins
    task = task_of(0) | {"OFFSET": "3", "SLURM_ARRAY_TASK_MAX": "0"}
    assert start_task(cluster, tmp_path, "--lr", "1e-3", **task).wait(60) == 0
    assert calls(tmp_path) == [f"main.py --resume --no-save_weights {LINES[3]} --lr 1e-3"]
    (link,) = logs.glob("method_so_dataset_digits_shots_1_seed_3_lr_1e-3.txt")
    assert link.resolve() == logs / "7_0.txt"
    said = (tmp_path / "output.txt").read_text()
    assert "note: runs 4 to 4 are not in this array" in said and f"bash {FAILURES} --lr" in said
    assert start_task(cluster, tmp_path, **task_of(5)).wait(60) == 0
    assert "there is no run 5: this sweep has runs 0 to 4" in (tmp_path / "output.txt").read_text()
    assert len(calls(tmp_path)) == 1


@pytest.mark.parametrize(
    "sent, restarts, requeued", [("USR1", 0, True), ("TERM", 0, False), ("USR1", 20, False)]
)
def test_a_task_that_is_stopped_waits_for_its_checkpoint_and_near_its_limit_is_requeued(
    sent, restarts, requeued, cluster, tmp_path
):
    cluster["METHODS"] = "wait"
    task = task_of(0) | {"SLURM_RESTART_COUNT": str(restarts)}
    process = start_task(cluster, tmp_path, **task)
    wait_for("started", tmp_path, process)
    process.send_signal(signal.Signals[f"SIG{sent}"])
    assert process.wait(60) == 143
    assert (tmp_path / "checkpoint.pt").read_text() == "written\n"
    noted = tmp_path / "scontrol.txt"
    assert (noted.read_text() if noted.exists() else "") == "requeue 7_0\n" * requeued
    assert ("not requeued" in (tmp_path / "output.txt").read_text()) == (restarts == 20)


def test_without_an_array_the_job_makes_the_whole_sweep_and_is_requeued_as_one(cluster, tmp_path):
    job = {"SLURM_JOB_ID": "9"}
    assert start_task(cluster, tmp_path, **job).wait(60) == 0
    assert [line[-1] for line in calls(tmp_path)] == ["0", "1", "2", "3", "4"]
    process = start_task(cluster | {"METHODS": "wait"}, tmp_path, **job)
    wait_for("started", tmp_path, process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 130
    assert (tmp_path / "checkpoint.pt").exists()
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 9\n"


def test_failures_are_listed_with_their_logs_last_words(cluster, tmp_path):
    logs = Path(cluster["LOGS"])
    logs.mkdir()
    said = {
        1: "main.py: error: of an earlier start\n==> start 2\nmain.py: error: no disk\ntorch's\n",
        2: "\nTraining: 1/9 it\rTraining: 2/9 it",
        3: "Training: 1/9 it\rslurmstepd-n1: error: Detected 1 oom-kill event(s)\n==> ended\n",
    }
    for number, text in said.items():
        (logs / f"7_{number}.txt").write_text(f"==> start 1\n{text}")
        name = logs / f"method_so_dataset_digits_shots_1_seed_{number}.txt"
        name.symlink_to(f"7_{number}.txt")
    (tmp_path / "finished.txt").write_text(f"{LINES[4]}\n")
    status, out, _ = bash(FAILURES, environment=cluster, folder=tmp_path)
    start = f"{logs}/method_so_dataset_digits_shots_1_seed"
    assert status == 1 and out.splitlines() == [
        f"0: {LINES[0]}",
        "    no log",
        f"1: {LINES[1]}",
        f"    {start}_1.txt: main.py: error: no disk",
        f"2: {LINES[2]}",
        f"    RUNNING, {start}_2.txt: Training: 2/9 it",
        f"3: {LINES[3]}",
        f"    {start}_3.txt: slurmstepd-n1: error: Detected 1 oom-kill event(s)",
    ]
    (tmp_path / "finished.txt").write_text("\n".join(LINES))
    assert bash(FAILURES, environment=cluster, folder=tmp_path)[:2] == (0, "")


def test_a_run_of_several_processes_is_started_by_torchrun(cluster, tmp_path):
    cluster["PROCESSES"] = "4"
    status, out, _ = bash(SUBMIT, "--dry-run", environment=cluster, folder=tmp_path)
    header, run, *_ = out.splitlines()
    assert status == 0 and " PROCESSES=4 " in header
    assert " -m torch.distributed.run --standalone --nproc_per_node 4 -- main.py " in run
