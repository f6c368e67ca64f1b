"""Commands called in this process, what they print, and what runs and sweeps write."""

import csv
import io
import json
import re
import signal
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import partial

import main
import train
from runs import cli
from runs.signals import Preempted

PROGRAM = re.compile(r"\w+\.py[ :]")  # a message begins with its program


def call(run, *argv):
    """Call a command's main function; return (status, standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = run([str(arg) for arg in argv])
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def output_of(program, *argv):
    """Call a command, which must succeed; return its standard output."""
    status, out, err = call(program, *argv)
    assert status == 0, err
    return out


def error_of(program, *argv):
    """Call a command, which must end in one sentence; return it, without notes and progress."""
    status, _, err = call(program, *argv)
    *before, last = err.splitlines() or [""]
    assert status == 2 and PROGRAM.match(last) and last.isprintable(), err
    assert not any(map(PROGRAM.match, before)) and "Traceback" not in err, err
    return last


def run_main(argv):
    return cli.run_cli(lambda: main.main(argv))


call_main, run, refused = (partial(f, run_main) for f in (call, output_of, error_of))


def run_folder(out):
    """The folder of the one run below a folder."""
    (config,) = out.rglob("config.yaml")
    return config.parent


def result_of(out):
    """result.json of the one run below a folder."""
    return json.loads((run_folder(out) / "result.json").read_text(encoding="utf-8"))


def read_losses(out):
    """The loss column of curve.csv of the one run below a folder."""
    with open(run_folder(out) / "curve.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def outcome(out):
    """What the one run below a folder leaves, except times and paths."""
    files = {path.name: path.read_bytes() for path in run_folder(out).iterdir()}
    keys = "zero_shot_accuracy", "final_accuracy", "last_accuracy", "iterations", "per_class", "ece"
    result = result_of(out)
    return files | {"config.yaml": "", "result.json": [result[key] for key in keys]}


def act_after(iteration, action):
    """`main.train`, but with an action after an iteration, before main.py looks for signals."""

    def train_and_act(classifier, optimizer, batches, state, config):
        for _ in train.train(classifier, optimizer, batches, state, config):
            if state.iteration == iteration:
                action()
            yield

    return train_and_act


def preempt():
    """End a run as SIGTERM would."""
    raise Preempted(signal.SIGTERM)


def wait_for(pattern, folder, process):
    """Wait until a process has written a file of this name; return its path."""
    while not (found := list(folder.rglob(pattern))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return found[0]


def calls(folder):
    """The arguments of each main.py that `fake_python` was called with, a line each."""
    return (folder / "calls.txt").read_text().splitlines()
