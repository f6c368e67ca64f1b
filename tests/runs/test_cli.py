"""How programs end: output that cannot be written, signals, launchers, foreign modules."""

import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from commands import act_after, call_main, result_of, run

import main
from runs import cli
from runs.distributed import init_store
from runs.environment import RunClock
from runs.signals import SIGNALS, SignalHandler

ROOT = Path(__file__).parents[2]
SHORT = ["--shots", "1", "--n_iters", "4", "--num_workers", "0"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE, errno.EIO])
def test_output_errors_lose_nothing(number, tmp_path, monkeypatch):
    class Broken(io.StringIO):
        def write(self, text):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sys, "stdout", Broken())
    monkeypatch.setattr(sys, "stderr", Broken())
    argv = [*SHORT, "--save_path", str(tmp_path)]
    assert cli.run_cli(lambda: main.main(argv)) == 0
    assert result_of(tmp_path)["iterations"] == 4


def test_closed_pipe_is_no_error(tmp_path):
    command = [sys.executable, "main.py", *SHORT, "--save_path", tmp_path]
    with subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0
    assert result_of(tmp_path)["iterations"] == 4


@pytest.fixture
def signal_handlers():
    """The handlers before the test, which are restored after it."""
    before = {name: signal.getsignal(signal.Signals[name]) for name in SIGNALS}
    yield before
    for name, handler in before.items():
        signal.signal(signal.Signals[name], handler)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGXCPU"])
def test_signals_leave_a_checkpoint(name, tmp_path, monkeypatch, signal_handlers):
    signum = signal.Signals[name]
    signal.signal(signum, signal.SIG_DFL)  # nohup ignores SIGHUP
    monkeypatch.setattr(main, "train", act_after(2, partial(signal.raise_signal, signum)))
    status, _, err = call_main(*SHORT, "--save_path", tmp_path)
    assert status == 128 + signum
    assert f"ended by {name}; --resume continues from iteration 2" in err
    assert list(tmp_path.rglob("checkpoint.pt"))


def test_ignored_hangup_stays_ignored(signal_handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with SignalHandler() as signals:
        signal.raise_signal(signal.SIGHUP)
    assert not signals.pending
    with ThreadPoolExecutor() as pool:  # outside the main thread there are no handlers
        assert not pool.submit(SignalHandler().__enter__).result().previous_handlers


def test_results_precede_their_printing(tmp_path, monkeypatch):
    def refuse(*_):
        assert result_of(tmp_path)["iterations"] == 4
        raise RuntimeError("printed")

    printing = iter([lambda *_: None, refuse])
    monkeypatch.setattr(cli, "print_accuracies", lambda *a: next(printing)(*a))
    with pytest.raises(RuntimeError, match="printed"):
        run(*SHORT, "--save_path", tmp_path)


def test_clock_leaves_gaps_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(threading.Thread, "start", lambda _: None)
    clock = RunClock(20)
    now[0] += 3
    assert clock.seconds() == 23
    now[0] += 3600
    assert clock.seconds() == 23 + clock.MAX_GAP_S


@pytest.mark.parametrize(
    "env, words",
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR and MASTER_PORT is not set"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "srun started 2 processes"),
    ],
)
def test_unknown_launchers_are_refused(env, words, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        init_store()


def test_foreign_modules_are_named(tmp_path):
    (tmp_path / "datasets.py").touch()
    code = f"import sys; sys.path.append({str(ROOT)!r}); import main"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert "needs its own module 'datasets'" in last and "sys.path.insert(0" in last


def test_main_runs_in_safe_path(tmp_path):
    env, command = {**os.environ, "PYTHONSAFEPATH": "1"}, [sys.executable, ROOT / "main.py"]
    done = subprocess.run([*command, "--help"], cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0 and b"--dataset" in done.stdout, done.stderr


def test_density_note_names_flag(tmp_path):
    out = run(*SHORT, "--s", "0.9999", "--save_path", tmp_path)
    assert "24 of them keep fewer than ten entries and barely train: lower --s" in out
