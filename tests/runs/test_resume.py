"""Nothing lost: resumed runs end as unbroken ones, whatever ended them; checkpoints and locks."""

import copy
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import main
import utils
from benchmarks.kills import outcome, trial
from checkpoint import read_checkpoint
from optimizers.snapshot import Snapshot
from optimizers.SparseOptimizer import SO
from run_utils import exit_status
from utils import Interrupted, Signals, content_digest, lock

ROOT = Path(__file__).parents[2]
LONG = ["--n_iters", "100000", "--early_stop_loss", "0"]
COMMON = ["--shots", "1", "--n_iters", "12", "--save_weights", "--num_workers", "0"]


def command(out, *extra):
    return [sys.executable, "main.py", *COMMON, "--save_path", str(out), *extra]


def start(out, *extra, **options):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command(out, *extra), cwd=ROOT, **pipes, **options)


def wait_for(out, pattern, process):
    """Return the first path below a folder that matches, once there is one."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if found := next(out.rglob(pattern), None):
            return found
        time.sleep(0.01)
    raise AssertionError(f"no {pattern}: {process.communicate()}")


def adapt(out, *extra):
    main.main([*COMMON, "--save_path", str(out), *extra])


def broken_at(monkeypatch, iterations):
    """Have a signal come after these iterations; each process of the run looks at its own."""
    left = list(iterations)
    calls = 0

    def check(self):
        nonlocal calls
        calls += 1
        if left and calls == left[0]:
            left.pop(0)
            calls = 0
            raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(Signals, "check", check)


@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast")  # torch 2.4's own, when recomputing
@pytest.mark.parametrize(
    "extra",
    [
        ["--method", "so", "--t", "4", "--num_workers", "2"],
        ["--method", "so", "--select", "val", "--eval_every", "5", "--accumulate", "3"],
        ["--method", "so", "--moment_support", "random", "--grad_support", "magnitude"],
        ["--method", "so", "--precision", "fp16", "--encoder", "text"],
        ["--method", "lora", "--text_chunk", "4"],
        ["--method", "lora", "--select", "val", "--eval_every", "4", "--precision", "bf16"],
        ["--method", "adam", "--accumulate", "2", "--batch_size", "5"],
    ],
    ids=" ".join,
)
def test_a_resumed_run_ends_as_an_unbroken_one(extra, tmp_path, monkeypatch, capsys):
    adapt(tmp_path / "whole", *extra)
    # Calls come after each iteration and before each evaluation, of which the first is zero-shot.
    broken_at(monkeypatch, [6, 4])
    for _ in range(2):
        with pytest.raises(Interrupted):
            adapt(tmp_path / "broken", "--resume", *extra)
        (checkpoint,) = (tmp_path / "broken").rglob("checkpoint.pt")
        torch.manual_seed(int(time.time()))
    data = torch.load(checkpoint, weights_only=True)
    assert 5 < data["course"]["count"] < 12
    adapt(tmp_path / "broken", "--resume", *extra)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    assert not checkpoint.exists()
    capsys.readouterr()
    for name in ("checkpoint.pt", ".lock", ".curve.csv.99.tmp"):  # killed at its very end
        (checkpoint.parent / name).write_text("left")
    adapt(tmp_path / "broken", "--resume", *extra)
    assert "This run is finished" in capsys.readouterr().out
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_a_checkpoint_of_so_holds_what_changed_and_not_the_model(tmp_path, monkeypatch):
    broken_at(monkeypatch, [6])
    with pytest.raises(Interrupted):
        adapt(tmp_path, "--s", "0.999", "--t", "2")
    (path,) = tmp_path.rglob("checkpoint.pt")
    data = torch.load(path, weights_only=True)
    entries = sum(len(at) for at, _ in data["weights"])
    assert 1 < entries / 884 <= 3  # of 885 thousand entries, three draws of 884
    assert path.stat().st_size < 300_000


def test_a_snapshot_knows_every_entry_that_was_ever_drawn():
    params = [nn.Parameter(torch.randn(*shape)) for shape in ((37, 11), (64, 50), (5,))]

    def begin():
        return Snapshot(SO(params, density_ratio=0.02, T=2, seed=1))

    snapshot, drawn = begin(), [set(), set()]
    for step in range(40):
        for p in params:
            p.grad = torch.randn_like(p)
        snapshot.optimizer.step()
        for p, entries in zip(params, drawn, strict=False):
            entries.update(snapshot.optimizer.state[p]["grad_indices"].tolist())
        if step == 20:
            state = copy.deepcopy(snapshot.state())  # of which another goes on
            snapshot = begin()
            snapshot.load(state)
    *sparse, dense = snapshot.entries()
    assert [at.tolist() for at in sparse] == [sorted(entries) for entries in drawn]
    assert dense is None


@pytest.mark.parametrize("kills", [3])
def test_killed_runs_end_as_an_unbroken_one(kills, tmp_path):
    assert trial(kills, 0, ["--n_iters", "8"], tmp_path).total() == kills


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_leave_a_checkpoint_and_their_status(number, status, tmp_path):
    process = start(tmp_path, *LONG, "--checkpoint_every", "3")
    wait_for(tmp_path, "checkpoint.pt", process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status and "--resume goes on" in err and "Traceback" not in err
    (path,) = tmp_path.rglob("checkpoint.pt")
    assert torch.load(path, weights_only=True)["course"]["count"] >= 3
    assert {p.name for p in path.parent.iterdir()} == {"checkpoint.pt", "config.yaml"}


def test_a_second_signal_kills_and_deferred_ones_wait(tmp_path):
    process = start(tmp_path, *LONG, "--checkpoint_every", "1")
    wait_for(tmp_path, "checkpoint.pt", process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (143, -signal.SIGTERM)
    signals = Signals()
    with signals, pytest.raises(Interrupted) as stop:
        signal.raise_signal(signal.SIGTERM)
    assert exit_status(lambda: (_ for _ in ()).throw(stop.value)) == 143
    with signals:
        signals.pending = 0
        with signals.deferred():
            signal.raise_signal(signal.SIGINT)  # nothing happens yet
            signal.raise_signal(signal.SIGTERM)  # nor by one of another kind
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
            with pytest.raises(Interrupted):
                signals.check()
            signals.pending = 0


def test_without_resume_a_run_starts_anew_and_says_so(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        broken_at(patch, [6])
        with pytest.raises(Interrupted):
            adapt(tmp_path)
    adapt(tmp_path)
    assert "--resume would go on from" in capsys.readouterr().err
    assert list(tmp_path.rglob("checkpoint.pt")) == []


# Checkpoints that are no good


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        broken_at(patch, [6])
        with pytest.raises(Interrupted):
            adapt(tmp_path)
    return next(tmp_path.rglob("checkpoint.pt"))


def change(path, **entries):
    """Write a checkpoint with other entries, and the digest that belongs to them."""
    data = torch.load(path, weights_only=True)
    data.pop("digest")
    data.update(entries)
    torch.save({**data, "digest": content_digest(data)}, path)


def refused(path, capsys, *extra):
    before = path.read_bytes()
    try:
        status = exit_status(lambda: adapt(path.parents[5], "--resume", *extra))
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err
    assert status == 2 and path.read_bytes() == before
    lines = [line for line in err.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1 and str(path) in lines[0], err
    return lines[0]


def test_a_damaged_checkpoint_is_refused(checkpoint, capsys):
    whole = checkpoint.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"\x80\x04nonsense", whole[1000:]):
        checkpoint.write_bytes(data)
        assert "damaged" in refused(checkpoint, capsys)
    place = whole.rfind(b"\x3f", 0, len(whole) // 2)  # in a tensor: torch itself does not notice
    checkpoint.write_bytes(whole[:place] + b"\x3e" + whole[place + 1 :])
    assert "damaged" in refused(checkpoint, capsys)
    checkpoint.write_bytes(whole)
    adapt(checkpoint.parents[5], "--resume")


def test_a_checkpoint_of_another_run_is_refused(checkpoint, capsys):
    assert "lr 0.005 there, 0.1 here" in refused(checkpoint, capsys, "--lr", "0.1")
    change(checkpoint, base_digest="0" * 64)
    assert "other weights" in refused(checkpoint, capsys)
    change(checkpoint, version=99)
    assert "version 99" in refused(checkpoint, capsys)
    data = torch.load(checkpoint, weights_only=True)
    del data["base_digest"], data["digest"]
    torch.save({**data, "digest": content_digest(data)}, checkpoint)
    assert "damaged" in refused(checkpoint, capsys)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: {"course": data["course"] | {"count": 99}},
        lambda data: {"course": data["course"] | {"epoch_start": 9}},
        lambda data: {"course": {"count": 3}},
        lambda data: {"course": data["course"] | {"accuracies": "none"}},
        lambda data: {"course": data["course"] | {"accuracies": {3: "high"}}},
        lambda data: {"course": data["course"] | {"scaler": {"scale": 2.0}}},
        lambda data: {"course": data["course"] | {"ended": 1}},
        lambda data: {"weights": data["weights"][1:]},
        lambda data: {"weights": [(at + 10**7, v) for at, v in data["weights"]]},
        lambda data: {"weights": [(at, v * float("nan")) for at, v in data["weights"]]},
        lambda data: {"weights": [(at, v[1:]) for at, v in data["weights"]]},
        lambda data: {"optimizer": {"state": {}, "param_groups": []}},
        lambda data: {"generators": [torch.zeros(3, dtype=torch.uint8)]},
        lambda data: {"best": None},
        lambda data: {"seconds": "long"},
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused(spoil, checkpoint, capsys):
    change(checkpoint, **spoil(torch.load(checkpoint, weights_only=True)))
    assert "does not fit this run" in refused(checkpoint, capsys)


# Disks and folders


def limited():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # like a full disk, per file


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path):
    process = start(tmp_path, "--checkpoint_every", "4", preexec_fn=limited)
    _, err = process.communicate(timeout=120)
    assert "checkpoint.pt could not be written" in err
    assert process.returncode == 2  # the weights, which are larger than the limit
    assert "weights.safetensors" in err and "Traceback" not in err
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"config.yaml", "curve.csv"}  # nothing half-written, and no result


@pytest.mark.parametrize("name", ["curve.csv", "weights.safetensors", "result.json"])
def test_a_result_that_cannot_be_written_leaves_the_checkpoint(name, tmp_path, monkeypatch, capsys):
    replace = os.replace

    def fails(source, target):
        if Path(target).name == name:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(utils.os, "replace", fails)
        assert exit_status(lambda: adapt(tmp_path, "--checkpoint_every", "5")) == 2
    err = capsys.readouterr().err
    assert name in err and "Read-only file system" in err
    (checkpoint,) = tmp_path.rglob("checkpoint.pt")
    assert torch.load(checkpoint, weights_only=True)["course"]["count"] == 10
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("result.json"))
    adapt(tmp_path, "--resume")
    adapt(tmp_path / "whole")
    whole = outcome(tmp_path / "whole")
    for path in (tmp_path / "whole").rglob("*"):
        path.unlink() if path.is_file() else None
    assert outcome(tmp_path) == whole


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(tmp_path, capsys):
    extra = ["--lr", "1e30", "--checkpoint_every", "1"]
    assert exit_status(lambda: adapt(tmp_path, *extra)) == 2
    assert "the loss became" in capsys.readouterr().err
    (path,) = tmp_path.rglob("checkpoint.pt")
    course = torch.load(path, weights_only=True)["course"]
    assert course["count"] >= 1 and course["losses"].isfinite().all()


def test_paths_of_any_letters(tmp_path, capsys):
    out = tmp_path / 'it\'s a "path" – 数字 $HOME; é'
    adapt(out)
    assert exit_status(lambda: adapt(out, "--eval_only")) == 0
    result = json.loads(next(out.rglob("result.json")).read_text())
    assert f"{result['final_accuracy']:.2f}" in capsys.readouterr().out.splitlines()[-1]


# Locks


def test_a_second_run_in_a_folder_is_told_who_has_it(tmp_path):
    process = start(tmp_path, *LONG, "--checkpoint_every", "1")
    wait_for(tmp_path, "checkpoint.pt", process)
    second = subprocess.run(command(tmp_path), cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert f"in use by process {process.pid}" in second.stderr
    process.kill()
    process.communicate()
    (folder,) = {path.parent for path in tmp_path.rglob("checkpoint.pt")}
    with lock(folder):  # the killed one's lock is gone
        pass
    assert not (folder / ".lock").exists()


def test_locks_are_of_one_process_at_a_time(tmp_path):
    with lock(tmp_path):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"):
            with lock(tmp_path):
                pass
        assert (tmp_path / ".lock").exists()
    with lock(tmp_path):
        pass


def test_checkpoints_are_read_as_data_alone(checkpoint, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"version": 1, "config": Evil()}, checkpoint)
    config = main.parse_args(["--resume"])
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(checkpoint.parent, config, "")
    assert not (tmp_path / "owned").exists()
