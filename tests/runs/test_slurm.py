"""Sweeps on SLURM, with fake commands; docs/clusters.md says what a real SLURM did."""

import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from commands import calls, wait_for

ROOT = Path(__file__).parents[2]
SUBMIT, LIST_FAILED = ROOT / "scripts/slurm_sweep.sh", ROOT / "scripts/list_failed.sh"
LINES = [f"--method so --dataset digits --shots 1 --seed {seed}" for seed in range(5)]
LOG = "method_so_dataset_digits_shots_1_seed_{}.txt"
FAKES = {  # of SLURM's commands: they note how they are called
    "sbatch": """printf '%s\\n' "$@" >sbatch.txt; cat "$PENDING" >pending.txt""",
    "scontrol": 'echo "$@" >scontrol.txt',
    "squeue": "$SQUEUE",
}
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def cluster(tmp_path, fake_python):
    """The environment of a sweep of five runs, with SLURM's commands."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in FAKES.items():
        (commands / name).write_text(f'#!/usr/bin/env bash\ncd "{tmp_path}" || exit\n{body}\n')
        (commands / name).chmod(0o755)
    (tmp_path / "my logs").mkdir()
    sweep = {"DATASETS": "digits", "METHODS": "so", "SHOTS": "1", "SEEDS": "0 1 2 3 4"}
    paths = {"PATH": f"{commands}:{os.environ['PATH']}", "LOGS": str(tmp_path / "my logs")}
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "DATA"))}
    return {**outside, **sweep, **paths, "PYTHON": str(fake_python)}


def bash(environment, script, *arguments):
    command = ["bash", script, *arguments]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)


def start_task(environment, folder, number, *arguments, **variables):
    """Start what SLURM starts: a copy of the script, in the repository's folder."""
    script, pending = folder / "slurm_script", folder / "pending.txt"
    shutil.copy(SUBMIT, script)
    pending.write_text("\n".join(LINES).replace("so", environment["METHODS"]))
    task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(number), "PENDING": str(pending)}
    with open(folder / "output.txt", "w") as output:
        return subprocess.Popen(
            ["bash", script, *arguments], cwd=ROOT, env={**environment, **task, **variables},
            stdout=output, stderr=output,
        )  # fmt: skip


def test_pending_runs_are_submitted(cluster, tmp_path):
    (tmp_path / "finished.txt").write_text(f"{LINES[1]}\n")
    cluster |= {"SBATCH": "--partition=gpu --mem=4G", "JOBS": "3"}
    arguments = ["--lr", "1e-3", "--template", "a {}."]
    command, *lines = bash(cluster, SUBMIT, "--dry-run", *arguments).stdout.rstrip().splitlines()
    pending = [LINES[0], *LINES[2:]]
    assert lines == pending and not (tmp_path / "sbatch.txt").exists()
    assert bash(cluster, SUBMIT, *arguments).returncode == 0
    submitted = (tmp_path / "sbatch.txt").read_text().splitlines()
    assert shlex.split(command) == ["sbatch", *submitted]
    assert (tmp_path / "pending.txt").read_text().splitlines() == pending
    assert {"--array=1-4%3", f"--chdir={ROOT}", "--partition=gpu", "--mem=4G"} < set(submitted)
    assert submitted[-5:] == [str(SUBMIT), *arguments]


def test_task_makes_its_run(cluster, tmp_path):
    assert start_task(cluster, tmp_path, 4).wait() == 0
    assert calls(tmp_path) == [f"main.py --resume --no-save_weights {LINES[3]}"]
    assert os.readlink(tmp_path / "my logs" / LOG.format(3)) == "7_4.txt"
    assert start_task(cluster, tmp_path, 6).wait() == 0 and len(calls(tmp_path)) == 1
    assert start_task(cluster, tmp_path, 1, "--lr", "1e-3", PROCESSES="4").wait() == 0
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 4 -- main.py --resume"
    assert torchrun in calls(tmp_path)[-1] and calls(tmp_path)[-1].endswith(" --lr 1e-3")


@pytest.mark.parametrize(
    "sent, restarts, requeued", [("USR1", 0, True), ("TERM", 0, False), ("USR1", 20, False)]
)
def test_stopped_task_is_requeued(sent, restarts, requeued, cluster, tmp_path):
    cluster |= {"METHODS": "wait", "SLURM_RESTART_COUNT": str(restarts)}
    process = start_task(cluster, tmp_path, 1)
    wait_for("started", tmp_path, process)
    process.send_signal(getattr(signal, f"SIG{sent}"))
    assert process.wait() == 143
    assert (tmp_path / "checkpoint.pt").read_text() == "written\n"
    noted = tmp_path / "scontrol.txt"
    assert (noted.read_text() if noted.exists() else "") == "requeue 7_1\n" * requeued
    output = (tmp_path / "output.txt").read_text()
    assert "ended with status 143" in output and ("not requeued" in output) == (restarts == 20)


@pytest.mark.parametrize("squeue, state", [("echo 7_2 RUNNING", "RUNNING, "), ("exit 1", "")])
def test_failed_runs_are_listed(squeue, state, cluster, tmp_path):
    cluster["SQUEUE"] = squeue
    output = {
        1: "main.py: error: of an earlier start\n==> start 2\nmain.py: error: no disk\ntorch's\n",
        2: "\nTraining: 1/9 it\rTraining: 2/9 it",
        3: "Training: 1/9 it\rslurmstepd-n1: error: Detected 1 oom-kill event(s)\n==> ended\n",
    }
    logs = tmp_path / "my logs"
    for number, text in output.items():
        (logs / f"7_{number}.txt").write_text(f"==> start 1\n{text}")
        (logs / LOG.format(number)).symlink_to(f"7_{number}.txt")
    (tmp_path / "finished.txt").write_text(f"{LINES[4]}\n")
    last_words = [
        "no log",
        f"{logs / LOG.format(1)}: main.py: error: no disk",
        f"{state}{logs / LOG.format(2)}: Training: 2/9 it",
        f"{logs / LOG.format(3)}: slurmstepd-n1: error: Detected 1 oom-kill event(s)",
    ]
    expected = [line for pair in zip(LINES, last_words, strict=False) for line in pair]
    listed = bash(cluster, LIST_FAILED)
    assert listed.returncode == 1 and list(map(str.strip, listed.stdout.splitlines())) == expected
    (tmp_path / "finished.txt").write_text("\n".join(LINES))
    listed = bash(cluster, LIST_FAILED)
    assert listed.returncode == 0 and not listed.stdout
